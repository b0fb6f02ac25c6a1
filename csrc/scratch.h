// Memory for one worker, in one piece, aligned to the lines of the cache.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace regard {

class Scratch {
 public:
  explicit Scratch(int64_t numbers) : data_(static_cast<float*>(aligned_alloc(kLine, round_up(numbers * 4 + kSlack)))), next_(data_) {}
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  explicit operator bool() const { return data_ != nullptr; }

  float* take(int64_t numbers) {
    float* part = next_;
    next_ += round_up(numbers * 4) / 4;
    return part;
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kSlack = 16 * kLine;  // what rounding up takes, for up to 16 parts
  static int64_t round_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  float* data_;
  float* next_;
};

}  // namespace regard
