// The chunk table describes the tensors of a launch: rows of pointers, cut into chunks of equal length.
//
// A launch has one block per chunk, so one launch processes any number of tensors of any size. The table is in device
// memory. The host writes it again only if its content changed.
#pragma once

#include <stdint.h>

namespace crsam {

constexpr int kThreads = 256;  // threads of every block

// Elements of a chunk, 64 per thread. It is short enough to keep all multiprocessors busy to the end and to sum in
// float32, and long enough to amortize reading the row and the reduction at the end of a block.
constexpr int64_t kChunk = 1 << 14;

// The dtypes of rows of parameters and gradients.
enum class Dtype { float64, float32, float16, bfloat16 };

constexpr int kPasses = 3;  // maximum number of gradients of a step: g0, g+, g-
// The inner products of g0, d1 and d2: the upper triangle of their Gram matrix row by row, then h with each of them.
constexpr int kProducts = kPasses * (kPasses + 1) / 2, kGram = kProducts + kPasses;
constexpr int kBuffers = 2;  // maximum number of state buffers of an update rule

// The pointers of a row. Operators set unused pointers to null.
enum Pointer {
  kLive,                       // the parameters that the model reads
  kSaved,                      // w in the compute dtype; may equal kLive
  kDirection,                  // added to a gradient, in the compute dtype
  kState,                      // one for each buffer of the update rule, in the compute dtype
  kGrads = kState + kBuffers,  // one for each pass
  kPointers = kGrads + kPasses,
};

// One contiguous run of parameters with its pointers and metadata. There is no padding between the members, because the
// host compares tables byte by byte.
struct Row {
  void* pointers[kPointers];
  const float* step;  // the number of steps of the row, including this one
  int64_t numel;
  int32_t group;
  int16_t adaptive;  // whether to use the e of ASAM
  int16_t aligned;   // whether all `pointers` are multiples of 16
};
static_assert(sizeof(Row) == 8 * kPointers + 24, "Row must not contain padding");

struct Chunk {
  int32_t row;
  int32_t index;  // index of the chunk in its row
};

struct Table {
  const Row* rows;             // ordered by group
  const Chunk* chunks;         // [num_chunks], in the order of the rows
  const int64_t* group_begin;  // [num_groups + 1], the first chunk of each group
  unsigned* tickets;           // [num_groups], 0 between launches
  int64_t num_chunks;
  int32_t num_groups;
};

// A number known to the host, or a 0-dim tensor on the device.
struct Scalar {
  const float* single;
  const double* wide;
  double value;       // used if both pointers are null
  double complement;  // 1 - value, subtracted in float64: in float32, 1 - 0.999 would have only four correct digits
};

}  // namespace crsam
