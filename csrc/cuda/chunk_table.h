// What a kernel is told about the tensors it works on: rows of pointers, cut into chunks of equal length.
//
// A launch has one block per chunk, so one launch serves any number of tensors of any size. The table lies in device
// memory; the host writes it anew only when something in it has changed.
#pragma once

#include <stdint.h>

namespace crsam {

constexpr int kThreads = 256;  // of every block

// Elements of a chunk, 64 per thread: short enough to keep all multiprocessors busy to the end and to sum in float32,
// long enough to pay for reading the row and for the reduction at the end of a block.
constexpr int64_t kChunk = 1 << 14;

// The dtypes that a row of parameters, and of gradients, may have.
enum class Dtype { float64, float32, float16, bfloat16 };

constexpr int kPasses = 3;  // gradients of a step at most: g0, g+, g-
// Entries of the Gram matrix of g0 and the differences: its upper triangle row by row, then h with each of them.
constexpr int kProducts = kPasses * (kPasses + 1) / 2, kGram = kProducts + kPasses;
constexpr int kBuffers = 2;  // of an update rule's state at most

// The pointers of a row. Operators leave null what they do not use.
enum Pointer {
  kLive,                       // what the model reads
  kSaved,                      // w in the compute dtype; may be that of kLive
  kDirection,                  // what is added to a gradient, in the compute dtype
  kState,                      // of each buffer of the update rule, in the compute dtype
  kGrads = kState + kBuffers,  // of each pass
  kPointers = kGrads + kPasses,
};

// One contiguous run of parameters and all that belongs to it. The members have no gaps between them: the host compares
// tables byte by byte.
struct Row {
  void* pointers[kPointers];
  const float* step;  // how many steps the row has taken, this one included
  int64_t numel;
  int32_t group;
  int16_t adaptive;  // whether e is that of ASAM
  int16_t aligned;   // whether every one of `pointers` is a multiple of 16
};
static_assert(sizeof(Row) == 8 * kPointers + 24, "a gap in Row");

struct Chunk {
  int32_t row;
  int32_t index;  // of the chunk in its row
};

struct Table {
  const Row* rows;             // ordered by group
  const Chunk* chunks;         // [num_chunks], in the order of the rows
  const int64_t* group_begin;  // [num_groups + 1], the first chunk of each group
  unsigned* tickets;           // [num_groups], 0 between launches
  int64_t num_chunks;
  int32_t num_groups;
};

// A number that the host knows, or that lies in a 0-dim tensor on the device.
struct Scalar {
  const float* single;
  const double* wide;
  double value;       // where both pointers are null
  double complement;  // 1 - value, subtracted in float64: float32 would leave 1 - 0.999 four digits
};

}  // namespace crsam
