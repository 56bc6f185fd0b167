// Computes the host side of a table of rows.
#pragma once

#include <algorithm>
#include <vector>

#include "chunk_table.h"

namespace crsam {

// Sorts rows into the order of `Table`, and marks the rows that can be accessed in words of 128 bits.
inline void arrange(std::vector<Row>& rows) {
  std::stable_sort(rows.begin(), rows.end(), [](const Row& x, const Row& y) { return x.group < y.group; });
  for (Row& row : rows) {
    uintptr_t bits = 0;
    for (const void* pointer : row.pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
    row.aligned = bits % 16 == 0;
  }
}

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The parts of a table that depend only on lengths and groups.
struct Layout {
  std::vector<int64_t> group_begin;
  std::vector<Chunk> chunks;
  std::vector<unsigned> tickets;

  Layout(const std::vector<Row>& rows, int64_t num_groups) : group_begin(num_groups + 1), tickets(num_groups) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const int32_t count = static_cast<int32_t>(chunks_of(rows[i].numel));
      for (int32_t index = 0; index < count; ++index) chunks.push_back({static_cast<int32_t>(i), index});
      group_begin[rows[i].group + 1] += count;
    }
    for (int64_t g = 0; g < num_groups; ++g) group_begin[g + 1] += group_begin[g];
  }
};

}  // namespace crsam
