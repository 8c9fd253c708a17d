// The softmax of a block as sigmoids: z_c = x_c - log(sum of exp over the other channels), and its derivative, both in
// O(C). The C++ twin of the section of that name in kernels/reference.py.
#pragma once

#include <stdlib.h>

#include "loads.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

// u - w, and 0 where they are equal, also at infinity.
template <typename T>
BL_INLINE T difference(T u, T w) {
  return u == w ? T(0) : u - w;
}

template <typename T>
class Softmax {
 public:
  explicit Softmax(const bl_problem& problem) : channels_(problem.channels) {
    if (problem.activation != BL_SOFTMAX) return;
    const size_t blocks = static_cast<size_t>(channels_) * kPerChannel + kShared;
    memory_ = static_cast<T*>(malloc(blocks * kBlock * sizeof(T) + static_cast<size_t>(channels_) * sizeof(T*)));
    wanted_ = true;
    if (!memory_) return;
    x_ = reinterpret_cast<const T**>(memory_ + blocks * kBlock);
    T* next = memory_ + static_cast<size_t>(channels_) * kPerChannel * kBlock;
    T** const shared[] = {&largest_, &second_, &sum_others_, &winner_, &total_, &grad_winner_, &valid_};
    for (T** array : shared) {
      *array = next;
      next += kBlock;
    }
  }
  ~Softmax() { free(memory_); }
  Softmax(const Softmax&) = delete;
  Softmax& operator=(const Softmax&) = delete;

  bool has_memory() const { return !wanted_ || memory_; }
  static int64_t first(const bl_problem& problem) { return problem.channel0 == BL_UNUSED ? 1 : 0; }

  // Reads a block of all channels. For more than two: the largest logit and its channel; without that channel, which
  // may not be found by a difference, the largest and the sum of exp relative to it.
  void load(const bl_problem& problem, int64_t b, int64_t start, int n) {
    for (int64_t c = 0; c < channels_; ++c) {
      const int64_t offset = b * problem.logits.batch_stride + c * problem.logits.channel_stride + start;
      x_[c] = load_logits(problem.logits, offset, n, buffer(c));
    }
    if (channels_ == 2) return;
    T* __restrict largest = largest_;
    T* __restrict winner = winner_;
    T* __restrict second = second_;
    T* __restrict sum = sum_others_;
    for (int i = 0; i < kBlock; ++i) {
      largest[i] = x_[0][i];
      winner[i] = 0;
      second[i] = -static_cast<T>(INFINITY);
      sum[i] = 0;
    }
    for (int64_t c = 1; c < channels_; ++c) {
      const T* __restrict x = x_[c];
      const T own = static_cast<T>(c);
      for (int i = 0; i < kBlock; ++i) {
        const bool more = x[i] > largest[i];
        second[i] = more ? largest[i] : x[i] > second[i] ? x[i] : second[i];
        winner[i] = more ? own : winner[i];
        largest[i] = more ? x[i] : largest[i];
      }
    }
    for (int64_t c = 0; c < channels_; ++c) {
      const T* __restrict x = x_[c];
      const T own = static_cast<T>(c);
      for (int i = 0; i < kBlock; ++i)
        sum[i] += winner[i] == own ? T(0) : exp_nonpositive(difference(x[i], second[i]));
    }
  }

  // The logit of channel c alone, whose sigmoid is the channel's probability.
  void pre_activation(int64_t c, T* __restrict z) {
    const T* __restrict x = x_[c];
    if (channels_ == 2) {
      const T* __restrict other = x_[1 - c];
      for (int i = 0; i < kBlock; ++i) z[i] = x[i] - other[i];
      return;
    }
    const T* __restrict largest = largest_;
    const T* __restrict winner = winner_;
    const T* __restrict second = second_;
    const T* __restrict sum = sum_others_;
    T* __restrict factor = factors(c);
    const T own = static_cast<T>(c);
    for (int i = 0; i < kBlock; ++i) {
      const T rest = rest_of(x[i], largest[i], second[i], sum[i]);
      const T log_others = winner[i] == own ? second[i] + log1p_positive(sum[i] - 1) : largest[i] + log1p_positive(rest);
      z[i] = x[i] - log_others;
      factor[i] = T(1) / (T(1) + rest);
    }
  }

  void clear_gradient() {
    for (int i = 0; i < kBlock; ++i) valid_[i] = total_[i] = grad_winner_[i] = 0;
    if (channels_ == 2)
      for (int64_t c = 0; c < 2; ++c)
        for (int i = 0; i < kBlock; ++i) gradients(c)[i] = 0;
  }

  // The gradient with respect to the logit of channel c alone.
  void add_gradient(int64_t c, const T* __restrict grad, const Cells& cells) {
    T* __restrict own_grad = gradients(c);
    for (int i = 0; i < kBlock; ++i) own_grad[i] = grad[i];
    if (channels_ == 2) return;
    const T* __restrict winner = winner_;
    const T* __restrict factor = factors(c);
    T* __restrict total = total_;
    T* __restrict grad_winner = grad_winner_;
    T* __restrict valid = valid_;
    const T own = static_cast<T>(c);
    for (int i = 0; i < kBlock; ++i) {
      const bool wins = winner[i] == own;
      total[i] += wins ? T(0) : grad[i] * factor[i];
      grad_winner[i] = wins ? grad[i] : grad_winner[i];
      valid[i] = cells[i] >= 0 ? T(1) : valid[i];
    }
  }

  // The gradient with respect to the logits of channel c, once those of all channels alone are known.
  void gradient(int64_t c, bool has_own, T* __restrict grad) {
    const T* __restrict own_grad = gradients(c);
    if (channels_ == 2) {
      const T* __restrict other_grad = gradients(1 - c);
      for (int i = 0; i < kBlock; ++i) grad[i] = own_grad[i] - other_grad[i];
      return;
    }
    const T* __restrict x = x_[c];
    const T* __restrict winner = winner_;
    const T* __restrict factor = factors(c);
    const T own = static_cast<T>(c);
    for (int i = 0; i < kBlock; ++i) {
      const T own_part = has_own ? own_grad[i] : T(0);
      const T share = has_own ? own_part * factor[i] : T(0);
      const T log_others_of_winner = second_[i] + log1p_positive(sum_others_[i] - 1);
      const T loser = own_part - exp_nonpositive(difference(x[i], largest_[i])) * (total_[i] - share) -
                      grad_winner_[i] * exp_nonpositive(difference(x[i], log_others_of_winner));
      const T chained = winner[i] == own ? own_part - total_[i] : loser;
      grad[i] = valid_[i] > 0 ? chained : T(0);
    }
  }

 private:
  static constexpr size_t kPerChannel = 3;
  static constexpr size_t kShared = 7;

  // exp of all channels but one and the winner, relative to the winner
  static inline T rest_of(T x, T largest, T second, T sum) {
    return sum * exp_nonpositive(difference(second, largest)) - exp_nonpositive(difference(x, largest));
  }
  T* buffer(int64_t c) { return memory_ + static_cast<size_t>(c) * kBlock; }
  T* gradients(int64_t c) { return buffer(channels_ + c); }
  T* factors(int64_t c) { return buffer(2 * channels_ + c); }

  int64_t channels_;
  bool wanted_ = false;
  T* memory_ = nullptr;
  const T** x_ = nullptr;
  T* largest_ = nullptr;
  T* second_ = nullptr;
  T* sum_others_ = nullptr;
  T* winner_ = nullptr;  // a channel, as a T
  T* total_ = nullptr;
  T* grad_winner_ = nullptr;
  T* valid_ = nullptr;
};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
