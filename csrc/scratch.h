// Memory for one worker, in one piece, aligned to the lines of the cache.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <string.h>
#endif

namespace regard {

// Under AddressSanitizer, one part may not be left for the next: a line between them is forbidden. And what was not written
// yet is NaN, so that whoever reads it is found out.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;
inline void forbid(void* data, int64_t bytes) {
  if (data) memset(data, 0xff, bytes);
  if (data) __asan_poison_memory_region(data, bytes);
}
inline void allow(void* data, int64_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr int64_t kGap = 0;
inline void forbid(void*, int64_t) {}
inline void allow(void*, int64_t) {}
#endif

class Scratch {
 public:
  explicit Scratch(int64_t numbers)
      : data_(static_cast<float*>(aligned_alloc(kLine, round_up(numbers * 4 + kSlack)))), next_(data_) {
    forbid(data_, round_up(numbers * 4 + kSlack));
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  explicit operator bool() const { return data_ != nullptr; }

  float* take(int64_t numbers) {
    float* part = next_;
    allow(part, round_up(numbers * 4));
    next_ += (round_up(numbers * 4) + kGap) / 4;
    return part;
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kSlack = 16 * (kLine + kGap);  // what rounding up takes, for up to 16 parts
  static int64_t round_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  float* data_;
  float* next_;
};

}  // namespace regard
