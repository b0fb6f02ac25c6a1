// Memory of one worker: a single allocation, aligned to cache lines.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <string.h>
#endif

namespace regard {

// Under AddressSanitizer, a poisoned gap separates the parts, and unwritten memory is NaN, so that reads of
// uninitialized or foreign memory are detected.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;
inline void poison(void* data, int64_t bytes) {
  if (data) memset(data, 0xff, bytes);
  if (data) __asan_poison_memory_region(data, bytes);
}
inline void unpoison(void* data, int64_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr int64_t kGap = 0;
inline void poison(void*, int64_t) {}
inline void unpoison(void*, int64_t) {}
#endif

class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(aligned_alloc(kLine, round_up(count * 4 + kSlack)))), next_(data_) {
    poison(data_, round_up(count * 4 + kSlack));
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  explicit operator bool() const { return data_ != nullptr; }

  float* take(int64_t count) {
    float* part = next_;
    unpoison(part, round_up(count * 4));
    next_ += (round_up(count * 4) + kGap) / 4;
    return part;
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kSlack = 16 * (kLine + kGap);  // for rounding up to 16 parts
  static int64_t round_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  float* data_;
  float* next_;
};

}  // namespace regard
