// What the kernels share: sizes, status codes, and memory that is used again.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>

namespace {

constexpr int GROUP = 16;         // images side by side in a register
constexpr int BLOCK = 2 * GROUP;  // images side by side in a block
constexpr int DONE = 0, NO_MEMORY = 1;

// A scratch buffer that grows, one per thread and purpose; aligned to cache lines.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  // Room for `count` values; null, and `failed`, where there is none. An exception could not leave a thread's region.
  template <class T>
  T* get(size_t count, std::atomic<bool>& failed) {
    if (count * sizeof(T) > size) {
      std::free(memory);
      size = (count * sizeof(T) + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(4096, size);
      if (!memory) size = 0, failed = true;
    }
    return static_cast<T*>(memory);
  }
  ~Scratch() { std::free(memory); }
};

// NaN stays NaN: the instruction returns its second operand where either is.
inline __m512 relu(__m512 v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

}  // namespace
