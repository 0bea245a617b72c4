// Half layers of a decoder on CPUs with bfloat16 products: what `halves.py` describes.
//
// One parallel region an operation; its phases are dealt out by bytes of weights (panels), so that
// with few rows both the cores' shares of the memory's bandwidth and the experts' sizes balance.
// What is computed does not depend on the number of threads: every sum has one owner.
//
// Shapes are those of halves.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "team.h"
#include "vectors.h"

namespace moesaic {
namespace {

using torch::CustomClassHolder;
using MatrixPtr = c10::intrusive_ptr<Matrix>;

constexpr int64_t kLittle = 1 << 16; // multiplications that one thread does sooner alone

int team_size() {
  return std::min(at::get_num_threads(), kMostThreads);
}

void check_x(const Tensor& x, int64_t width) {
  TORCH_CHECK(
      x.dim() == 2 && x.size(1) == width && x.is_contiguous() && x.is_cpu(),
      "activations must be contiguous, (T, ", width, "), on the CPU");
  TORCH_CHECK(
      x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat,
      "activations must be bfloat16 or float32");
}

// Calls work(T*) with the tensor's numbers as bfloat16 or float32.
template <typename Work>
void typed(const Tensor& tensor, const Work& work) {
  if (tensor.scalar_type() == at::kFloat) {
    work(static_cast<float*>(tensor.data_ptr()));
  } else {
    work(static_cast<bf16*>(tensor.data_ptr()));
  }
}

template <typename Out>
void put(Out* to, __mmask16 mask, __m512 v, bool adds) {
  store16(to, mask, adds ? _mm512_add_ps(v, load16(to, mask)) : v);
}

// ---- rows ---------------------------------------------------------------------------------

struct Norm {
  Tensor weight;
  double eps;

  template <typename In>
  void operator()(const In* x, bf16* out, int64_t padded) const {
    const int64_t width = weight.numel();
    const float* w = weight.const_data_ptr<float>();
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += 16) {
      const __m512 v = load16(x + d, first16(width - d));
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + static_cast<float>(eps)));
    for (int64_t d = 0; d < padded; d += 16) {
      const __mmask16 mask = d < width ? first16(width - d) : 0;
      const __m512 v = _mm512_mul_ps(load16(x + d, mask), factor);
      store16(out + d, 0xffff, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, w + d)));
    }
  }
};

// Rows [begin, end) of x as a left factor, normed or as they are.
void left_rows(const Tensor& x, const Norm* norm, const Left& left, int64_t begin, int64_t end) {
  const int64_t width = x.size(1), padded = left.stride;
  bf16* out = left.wide;
  typed(x, [&](auto* data) {
    for (int64_t t = begin; t < end; ++t) {
      if (norm != nullptr) {
        (*norm)(data + t * width, out + t * padded, padded);
        continue;
      }
      for (int64_t d = 0; d < padded; d += 16) {
        const __mmask16 mask = d < width ? first16(width - d) : 0;
        store16(out + t * padded + d, 0xffff, load16(data + t * width + d, mask));
      }
    }
  });
  left.split(begin, end);
}

// ---- one matrix ---------------------------------------------------------------------------

Tensor multiply_matrix(const Tensor& x, const Norm* norm, const Matrix& matrix, bool wide) {
  check_x(x, matrix.cols);
  const int64_t count = x.size(0);
  Tensor y = at::empty({count, matrix.rows}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  Arena& arena = Arena::mine();
  const Left left = left_factor(arena, count, matrix.width(), matrix.kind);
  Scratch* scratch = scratches(arena, matrix.width());
  Queue queue;
  queue.reset(matrix.panels(), team_size());
  together([&](const Member& me) {
    const Tiles tiles(has_tiles());
    left_rows(x, norm, left, me.begin(count), me.end(count));
    me.wait();
    queue.run(me, [&](int64_t panel) {
      typed(y, [&](auto* out) {
        matrix.multiply_panel(panel, left, count, scratch[me.index], out);
      });
    });
  });
  return y;
}

Tensor linear(const MatrixPtr& matrix, const Tensor& x, bool wide) {
  return multiply_matrix(x, nullptr, *matrix, wide);
}

struct HeadHalf : CustomClassHolder {
  Norm norm;
  MatrixPtr head;

  HeadHalf(Tensor norm_, double eps, MatrixPtr head_)
      : norm{std::move(norm_), eps}, head(std::move(head_)) {}
  Tensor forward(const Tensor& x) {
    return multiply_matrix(x, &norm, *head, true);
  }
};

// ---- experts ------------------------------------------------------------------------------

struct Experts : CustomClassHolder {
  Tensor w13, w2;
  std::optional<Tensor> scale13_tensor, scale2_tensor;
  int64_t count, dim, inner;
  Kind kind;
  const float *scale13, *scale2; // (count, 2, inner panels * 32), (count, outer panels * 32)

  Experts(
      Tensor w13_, std::optional<Tensor> scale13_, Tensor w2_, std::optional<Tensor> scale2_,
      int64_t count_, int64_t dim_, int64_t inner_, int64_t kind_)
      : w13(std::move(w13_)),
        w2(std::move(w2_)),
        scale13_tensor(std::move(scale13_)),
        scale2_tensor(std::move(scale2_)),
        count(count_),
        dim(dim_),
        inner(inner_),
        kind(kind_of(kind_)),
        scale13(numbers(scale13_tensor, count * 2 * inner_panels() * kPanel)),
        scale2(numbers(scale2_tensor, count * outer_panels() * kPanel)) {
    TORCH_CHECK((scale2 != nullptr) == (kind != Kind::bfloat16), "scales go with 8 bits");
    if (count > 0) {
      check_data(w13, count * 2 * inner_panels() * kPanel * width() * item_bytes(kind));
      check_data(w2, count * outer_panels() * kPanel * inner_width() * item_bytes(kind));
    }
  }
  int64_t inner_panels() const {
    return (inner + kPanel - 1) / kPanel;
  }
  int64_t outer_panels() const {
    return (dim + kPanel - 1) / kPanel;
  }
  int64_t width() const {
    return round_up(dim, 2 * kPanel);
  }
  int64_t inner_width() const {
    return round_up(inner, 2 * kPanel);
  }
  Panels first(int64_t expert) const {
    Panels panels{static_cast<const uint8_t*>(w13.const_data_ptr()), kind, width()};
    panels.data += expert * 2 * inner_panels() * panels.panel_bytes();
    return panels;
  }
  Panels second(int64_t expert) const {
    Panels panels{static_cast<const uint8_t*>(w2.const_data_ptr()), kind, inner_width()};
    panels.data += expert * outer_panels() * panels.panel_bytes();
    return panels;
  }
};

using ExpertsPtr = c10::intrusive_ptr<Experts>;

// Rows that one expert computes: a run of the gathered copies.
struct Job {
  const Experts* weights;
  int64_t expert, row, rows;
  int64_t first_inner, first_outer; // among all jobs' panels
};

// The copies of one step: which expert computes which rows, and where results go.
class Grouped {
 public:
  // Either may be null: no routed expert is held here, or none is shared.
  Grouped(
      const Experts* routed, const Experts* shared, int64_t tokens, int64_t top_k, int64_t dim,
      Arena& arena)
      : routed_(routed),
        shared_(shared),
        tokens_(tokens),
        top_k_(top_k),
        dim_(dim),
        width_(round_up(dim, 2 * kPanel)) {
    const int64_t inner = std::max(
        routed == nullptr ? 0 : routed->inner_width(), shared == nullptr ? 0 : shared->inner_width());
    inner_width_ = inner;
    const int64_t copies = (routed == nullptr ? 0 : tokens * top_k) + (shared == nullptr ? 0 : tokens);
    const bool splits = (routed != nullptr && routed->kind == Kind::int8) ||
        (shared != nullptr && shared->kind == Kind::int8);
    const Kind kind = splits ? Kind::int8 : Kind::bfloat16;
    gathered_ = left_factor(arena, copies, width_, kind);
    inner_ = left_factor(arena, copies, inner, kind);
    results_ = arena.take<float>(copies * width_);
    slots_ = arena.take<int32_t>(tokens * top_k + 1);
    scratch_ = scratches(arena, std::max(width_, inner));
  }

  // Sorts copies by expert. One thread calls it, before a barrier; `experts` counts from 0 here,
  // and what is below or beyond those held is skipped.
  void sort(const int64_t* experts, int64_t first_expert, int size) {
    jobs_.clear();
    inner_panels_ = outer_panels_ = 0;
    int64_t rows = 0;
    if (routed_ != nullptr) {
      std::vector<int64_t> counts(static_cast<size_t>(routed_->count) + 1, 0);
      for (int64_t i = 0; i < tokens_ * top_k_; ++i) {
        const int64_t expert = experts[i] - first_expert;
        if (expert >= 0 && expert < routed_->count) {
          ++counts[expert];
        }
      }
      std::vector<int64_t> next(counts.size());
      for (int64_t e = 0; e < routed_->count; ++e) {
        next[e] = rows;
        if (counts[e] > 0) {
          add(routed_, e, rows, counts[e]);
        }
        rows += counts[e];
      }
      for (int64_t i = 0; i < tokens_ * top_k_; ++i) {
        const int64_t expert = experts[i] - first_expert;
        const bool held = expert >= 0 && expert < routed_->count;
        slots_[i] = held ? static_cast<int32_t>(next[expert]++) : -1;
      }
    }
    shared_row_ = rows_ = rows;
    if (shared_ != nullptr) {
      add(shared_, 0, rows, tokens_);
      rows_ += tokens_;
    }
    inner_queue_.reset(inner_panels_, size);
    outer_queue_.reset(outer_panels_, size);
  }

  // Everything after `sort` and its barrier; `left` are the normed rows. Each token's sum of
  // gate * result goes to done(token, d, mask, sum), 16 numbers at a time.
  template <typename Done>
  void run(
      const Member& me, const Left& left, const float* gates, const float* shared_gates,
      const Done& done) {
    const auto bring = [&](int64_t token, int64_t slot) {
      std::memcpy(
          gathered_.wide + slot * width_, left.wide + token * width_,
          static_cast<size_t>(width_) * 2);
      gathered_.split(slot, slot + 1);
    };
    if (routed_ != nullptr) {
      for (int64_t i = me.begin(tokens_ * top_k_); i < me.end(tokens_ * top_k_); ++i) {
        if (slots_[i] >= 0) {
          bring(i / top_k_, slots_[i]);
        }
      }
    }
    if (shared_ != nullptr) {
      for (int64_t t = me.begin(tokens_); t < me.end(tokens_); ++t) {
        bring(t, shared_row_ + t);
      }
    }
    me.wait();
    Scratch& scratch = scratch_[me.index];
    size_t at = 0;
    inner_queue_.run(me, [&](int64_t item) {
      const Job& job = job_of(item, at, [](const Job& j) { return j.first_inner; });
      activate(job, item - job.first_inner, scratch);
    });
    me.wait();
    if (inner_.high != nullptr) {
      inner_.split(me.begin(rows_), me.end(rows_));
      me.wait();
    }
    at = 0;
    outer_queue_.run(me, [&](int64_t item) {
      const Job& job = job_of(item, at, [](const Job& j) { return j.first_outer; });
      bring_back(job, item - job.first_outer, scratch);
    });
    me.wait();
    for (int64_t t = me.begin(tokens_); t < me.end(tokens_); ++t) {
      for (int64_t d = 0; d < dim_; d += 16) {
        const __mmask16 mask = first16(dim_ - d);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < top_k_ && routed_ != nullptr; ++k) {
          const int32_t slot = slots_[t * top_k_ + k];
          if (slot >= 0) {
            sum = _mm512_fmadd_ps(
                _mm512_loadu_ps(results_ + slot * width_ + d),
                _mm512_set1_ps(gates[t * top_k_ + k]), sum);
          }
        }
        if (shared_ != nullptr) {
          const float gate = shared_gates == nullptr ? 1.0f : shared_gates[t];
          sum = _mm512_fmadd_ps(
              _mm512_loadu_ps(results_ + (shared_row_ + t) * width_ + d), _mm512_set1_ps(gate), sum);
        }
        done(t, d, mask, sum);
      }
    }
  }

 private:
  void add(const Experts* weights, int64_t expert, int64_t row, int64_t rows) {
    jobs_.push_back({weights, expert, row, rows, inner_panels_, outer_panels_});
    inner_panels_ += weights->inner_panels();
    outer_panels_ += weights->outer_panels();
  }

  // The job that an item belongs to, sought from the last one found on.
  template <typename First>
  const Job& job_of(int64_t item, size_t& at, const First& first) const {
    while (first(jobs_[at]) > item) {
      --at;
    }
    while (at + 1 < jobs_.size() && first(jobs_[at + 1]) <= item) {
      ++at;
    }
    return jobs_[at];
  }

  // 32 columns of silu(x w1^T) * (x w3^T).
  void activate(const Job& job, int64_t panel, Scratch& scratch) {
    const Experts& e = *job.weights;
    const int64_t rows = e.inner_panels() * kPanel;
    bf16* out = inner_.wide + job.row * inner_width_ + panel * kPanel;
    const float* scale =
        e.scale13 == nullptr ? nullptr : e.scale13 + job.expert * 2 * rows + panel * kPanel;
    // Columns up to the widest network's are zero; the last panel sees to it.
    const int64_t pads = panel == e.inner_panels() - 1 ? inner_width_ - rows : 0;
    multiply(
        e.first(job.expert), 2 * panel, 2, gathered_.from(job.row), job.rows, scratch,
        [&](int64_t row, const float* sums) {
          for (int64_t c = 0; c < kPanel; c += 16) {
            __m512 h1 = _mm512_loadu_ps(sums + c);
            __m512 h3 = _mm512_loadu_ps(sums + kBlock + c);
            if (scale != nullptr) {
              h1 = _mm512_mul_ps(h1, _mm512_loadu_ps(scale + c));
              h3 = _mm512_mul_ps(h3, _mm512_loadu_ps(scale + rows + c));
            }
            store16(out + row * inner_width_ + c, 0xffff, _mm512_mul_ps(silu(h1), h3));
          }
          std::fill_n(out + row * inner_width_ + kPanel, pads, bf16{0});
        });
  }

  // 32 columns of an expert's result.
  void bring_back(const Job& job, int64_t panel, Scratch& scratch) {
    const Experts& e = *job.weights;
    float* out = results_ + job.row * width_ + panel * kPanel;
    const float* scale = e.scale2 == nullptr
        ? nullptr
        : e.scale2 + (job.expert * e.outer_panels() + panel) * kPanel;
    multiply(
        e.second(job.expert), panel, 1, inner_.from(job.row), job.rows, scratch,
        [&](int64_t row, const float* sums) {
          for (int64_t c = 0; c < kPanel; c += 16) {
            __m512 v = _mm512_loadu_ps(sums + c);
            if (scale != nullptr) {
              v = _mm512_mul_ps(v, _mm512_loadu_ps(scale + c));
            }
            _mm512_storeu_ps(out + row * width_ + c, v);
          }
        });
  }

  const Experts* routed_;
  const Experts* shared_;
  int64_t tokens_, top_k_, dim_, width_, inner_width_, shared_row_ = 0, rows_ = 0;
  int64_t inner_panels_ = 0, outer_panels_ = 0;
  std::vector<Job> jobs_;
  Queue inner_queue_, outer_queue_;
  Left gathered_, inner_; // copies of rows, and what is between the two products
  float* results_;          // (copies, width)
  int32_t* slots_;          // row of each token's k-th copy; -1 where its expert is not held
  Scratch* scratch_;
};

Tensor experts(
    const ExpertsPtr& weights, const Tensor& x, const Tensor& chosen, const Tensor& gates,
    int64_t first_expert) {
  check_x(x, weights->dim);
  TORCH_CHECK(
      chosen.dim() == 2 && chosen.size(0) == x.size(0) && chosen.sizes() == gates.sizes() &&
          chosen.scalar_type() == at::kLong && gates.scalar_type() == at::kFloat &&
          chosen.is_contiguous() && gates.is_contiguous(),
      "experts must be int64 and gates float32, both contiguous, (T, K)");
  const int64_t tokens = x.size(0);
  Tensor y = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  float* out = y.data_ptr<float>();
  Arena& arena = Arena::mine();
  const Left left = left_factor(arena, tokens, weights->width(), Kind::bfloat16);
  Grouped grouped(weights.get(), nullptr, tokens, chosen.size(1), weights->dim, arena);
  together([&](const Member& me) {
    const Tiles tiles(has_tiles());
    left_rows(x, nullptr, left, me.begin(tokens), me.end(tokens));
    if (me.leads()) {
      grouped.sort(chosen.const_data_ptr<int64_t>(), first_expert, me.size);
    }
    me.wait();
    grouped.run(
        me, left, gates.const_data_ptr<float>(), nullptr,
        [&](int64_t t, int64_t d, __mmask16 mask, __m512 sum) {
          store16(out + t * weights->dim + d, mask, sum);
        });
  });
  return y;
}

struct DenseHalf : CustomClassHolder {
  Norm norm;
  ExpertsPtr network;

  DenseHalf(Tensor norm_, double eps, ExpertsPtr network_)
      : norm{std::move(norm_), eps}, network(std::move(network_)) {}

  Tensor forward(const Tensor& x) {
    check_x(x, network->dim);
    Tensor y = at::empty(x.sizes(), x.options());
    compute(x, y, false);
    return y;
  }

  // Into y, or on top of it; y may be x.
  void compute(const Tensor& x, Tensor& y, bool adds) {
    const int64_t tokens = x.size(0), dim = network->dim;
    Arena& arena = Arena::mine();
    const Left left = left_factor(arena, tokens, network->width(), Kind::bfloat16);
    Grouped grouped(nullptr, network.get(), tokens, 0, dim, arena);
    together([&](const Member& me) {
      const Tiles tiles(has_tiles());
      left_rows(x, &norm, left, me.begin(tokens), me.end(tokens));
      if (me.leads()) {
        grouped.sort(nullptr, 0, me.size);
      }
      me.wait();
      typed(y, [&](auto* out) {
        grouped.run(
            me, left, nullptr, nullptr, [&](int64_t t, int64_t d, __mmask16 mask, __m512 sum) {
              put(out + t * dim + d, mask, sum, adds);
            });
      });
    });
  }
};

struct ExpertsHalf : CustomClassHolder {
  Norm norm;
  Tensor router;
  std::optional<Tensor> bias, shared_gate;
  int64_t top_k;
  bool renormalize;
  double norm_scale, norm_eps; // of the router's logits; 0: they stay as they are
  ExpertsPtr routed;
  int64_t first_expert;
  std::optional<ExpertsPtr> shared;

  ExpertsHalf(
      Tensor norm_, double eps, Tensor router_, std::optional<Tensor> bias_, int64_t top_k_,
      bool renormalize_, double norm_scale_, double norm_eps_, ExpertsPtr routed_,
      int64_t first_expert_, std::optional<ExpertsPtr> shared_, std::optional<Tensor> shared_gate_)
      : norm{std::move(norm_), eps},
        router(std::move(router_)),
        bias(std::move(bias_)),
        shared_gate(std::move(shared_gate_)),
        top_k(top_k_),
        renormalize(renormalize_),
        norm_scale(norm_scale_),
        norm_eps(norm_eps_),
        routed(std::move(routed_)),
        first_expert(first_expert_),
        shared(std::move(shared_)) {}

  std::tuple<Tensor, Tensor> forward(const Tensor& x) {
    check_x(x, routed->dim);
    Tensor y = at::empty(x.sizes(), x.options());
    Tensor chosen = compute(x, y, false);
    return {y, chosen};
  }

  // The experts chosen; their sum goes into y, or on top of it; y may be x.
  Tensor compute(const Tensor& x, Tensor& y, bool adds) {
    const int64_t tokens = x.size(0), dim = routed->dim, padded = routed->width();
    const int64_t count = router.size(0);
    Tensor chosen_tensor = at::empty({tokens, top_k}, x.options().dtype(at::kLong));
    auto* chosen = chosen_tensor.data_ptr<int64_t>();
    Arena& arena = Arena::mine();
    const Left left = left_factor(arena, tokens, padded, Kind::bfloat16);
    float* scores = arena.take<float>(tokens * count * 2);
    float* gates = arena.take<float>(tokens * top_k);
    float* shared_gates = shared_gate.has_value() ? arena.take<float>(tokens) : nullptr;
    Grouped grouped(
        routed->count > 0 ? routed.get() : nullptr, shared.has_value() ? shared->get() : nullptr,
        tokens, top_k, dim, arena);
    const bool little = tokens * count * dim <= kLittle;
    together([&](const Member& me) {
      const Tiles tiles(has_tiles());
      const int64_t begin = little ? 0 : me.begin(tokens), end = little ? tokens : me.end(tokens);
      if (!little || me.leads()) {
        left_rows(x, &norm, left, begin, end);
      }
      if (!little) {
        me.wait();
        // Experts are divided, not tokens: few tokens may meet many experts.
        for (int64_t t = 0; t < tokens; ++t) {
          score(left.wide + t * padded, scores + t * count * 2, me.begin(count), me.end(count));
        }
        me.wait();
      } else if (me.leads()) {
        for (int64_t t = 0; t < tokens; ++t) {
          score(left.wide + t * padded, scores + t * count * 2, 0, count);
        }
      }
      if (!little || me.leads()) {
        for (int64_t t = begin; t < end; ++t) {
          choose(scores + t * count * 2, count, chosen + t * top_k, gates + t * top_k);
          if (shared_gates != nullptr) {
            const float logit = product(left.wide + t * padded, shared_gate->const_data_ptr<float>(), dim);
            shared_gates[t] = 1.0f / (1.0f + std::exp(-logit));
          }
        }
      }
      if (!little) {
        me.wait();
      }
      if (me.leads()) {
        grouped.sort(chosen, first_expert, me.size);
      }
      me.wait();
      typed(y, [&](auto* out) {
        grouped.run(
            me, left, gates, shared_gates,
            [&](int64_t t, int64_t d, __mmask16 mask, __m512 sum) {
              put(out + t * dim + d, mask, sum, adds);
            });
      });
    });
    return chosen_tensor;
  }

 private:
  static float product(const bf16* x, const float* w, int64_t width) {
    __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
    int64_t d = 0;
    for (; d + 32 <= width; d += 32) {
      sum0 = _mm512_fmadd_ps(load16(x + d, 0xffff), _mm512_loadu_ps(w + d), sum0);
      sum1 = _mm512_fmadd_ps(load16(x + d + 16, 0xffff), _mm512_loadu_ps(w + d + 16), sum1);
    }
    for (; d < width; d += 16) {
      const __mmask16 mask = first16(width - d);
      sum0 = _mm512_fmadd_ps(load16(x + d, mask), _mm512_maskz_loadu_ps(mask, w + d), sum0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
  }

  void score(const bf16* x, float* scores, int64_t begin, int64_t end) const {
    const int64_t width = router.size(1);
    const float* w = router.const_data_ptr<float>();
    for (int64_t e = begin; e < end; ++e) {
      scores[e] = product(x, w + e * width, width);
    }
  }

  // Logits in scores[count] to choices; the second half of `scores` is room to work in.
  void choose(float* scores, int64_t count, int64_t* chosen, float* gates) const {
    if (norm_scale > 0) {
      const double mean = std::accumulate(scores, scores + count, 0.0) / static_cast<double>(count);
      double squares = 0;
      for (int64_t e = 0; e < count; ++e) {
        squares += (scores[e] - mean) * (scores[e] - mean);
      }
      const double variance = squares / static_cast<double>(count - 1);
      const double factor = norm_scale / (std::sqrt(variance > 0 ? variance : 1.0) + norm_eps);
      for (int64_t e = 0; e < count; ++e) {
        scores[e] = static_cast<float>((scores[e] - mean) * factor);
      }
    }
    const float most = *std::max_element(scores, scores + count);
    float total = 0;
    for (int64_t e = 0; e < count; ++e) {
      scores[e] = std::exp(scores[e] - most);
      total += scores[e];
    }
    float* ranked = scores + count;
    const float* offset = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
    for (int64_t e = 0; e < count; ++e) {
      scores[e] /= total;
      ranked[e] = scores[e] + (offset == nullptr ? 0.0f : offset[e]);
    }
    float kept = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t best = std::max_element(ranked, ranked + count) - ranked;
      chosen[k] = best;
      gates[k] = scores[best];
      kept += gates[k];
      ranked[best] = -std::numeric_limits<float>::infinity();
    }
    if (renormalize) {
      const float divisor = std::max(kept, std::numeric_limits<float>::min());
      for (int64_t k = 0; k < top_k; ++k) {
        gates[k] /= divisor;
      }
    }
  }
};

// ---- attention ----------------------------------------------------------------------------

// Where the tokens of one step stand.
struct Step {
  const Tensor &starts, &counts, &tables, &cosines, &sines;
};

struct AttentionHalf : CustomClassHolder {
  Norm norm;
  MatrixPtr qkv, out;
  std::vector<int64_t> first_head; // of each key-value head, and the end
  int64_t dim;
  std::optional<Tensor> q_norm, k_norm;
  int64_t window;

  AttentionHalf(
      Tensor norm_, double eps, MatrixPtr qkv_, MatrixPtr out_, const std::vector<int64_t>& groups,
      int64_t dim_, std::optional<Tensor> q_norm_, std::optional<Tensor> k_norm_, int64_t window_)
      : norm{std::move(norm_), eps},
        qkv(std::move(qkv_)),
        out(std::move(out_)),
        first_head{0},
        dim(dim_),
        q_norm(std::move(q_norm_)),
        k_norm(std::move(k_norm_)),
        window(window_) {
    for (const int64_t group : groups) {
      first_head.push_back(first_head.back() + group);
    }
    TORCH_CHECK(dim % 2 == 0, "a head of ", dim, " channels cannot be turned");
    TORCH_CHECK(
        qkv->rows == (heads() + 2 * kv_heads()) * dim && out->cols == heads() * dim,
        "projections do not fit ", heads(), " heads of ", dim);
  }
  int64_t heads() const {
    return first_head.back();
  }
  int64_t kv_heads() const {
    return static_cast<int64_t>(first_head.size()) - 1;
  }

  Tensor forward(
      const Tensor& x, const Tensor& starts, const Tensor& counts, const Tensor& tables,
      const Tensor& cosines, const Tensor& sines, const Tensor& k_pool, const Tensor& v_pool) {
    check_x(x, qkv->cols);
    Tensor y = at::empty({x.size(0), out->rows}, x.options());
    compute(x, {starts, counts, tables, cosines, sines}, k_pool, v_pool, y, false);
    return y;
  }

  // Into y, or on top of it; y may be x.
  void compute(
      const Tensor& x, const Step& step, const Tensor& k_pool, const Tensor& v_pool, Tensor& y,
      bool adds) {
    const int64_t tokens = x.size(0);
    const bool uses_tiles = has_tiles();
    Attention attention(k_pool, v_pool);
    set(attention, tokens, step, k_pool, v_pool);
    attention.plan(uses_tiles);

    const int64_t padded = qkv->width(), width = attention.width, columns = qkv->rows;
    const int64_t joined = out->width();
    Arena& arena = Arena::mine();
    const Left left = left_factor(arena, tokens, padded, qkv->kind);
    float* rows = arena.take<float>(tokens * columns);
    bf16* queries = arena.take<bf16>((tokens + kSlack) * heads() * width);
    const Left found = left_factor(arena, tokens, joined, out->kind);
    attention.partial = arena.take<float>(attention.partials * (2 + width));
    attention.packed_keys = arena.take<bf16>(attention.packed);
    attention.packed_values = arena.take<bf16>(attention.packed);
    attention.queries = queries;
    attention.out = found.wide;
    attention.out_stride = joined;
    int64_t most = 0; // query rows of a piece
    for (const Attention::Piece& piece : attention.pieces) {
      most = std::max(most, piece.sequence->count);
    }
    for (int64_t g = 0, count = most; g < kv_heads(); ++g) {
      most = std::max(most, count * (first_head[g + 1] - first_head[g]));
    }
    const int size = team_size();
    const int64_t space_size = kPiece * width;
    bf16* spaces = arena.take<bf16>(size * space_size);
    uint32_t* chances = arena.take<uint32_t>(size * (most + 4) * (kPiece / 2));
    const bool blocks = !attention.blocks.empty();
    float* scores = arena.take<float>(blocks ? size * kPanel * kSpan : 0);
    bf16* softened = arena.take<bf16>(blocks ? size * kPanel * kSpan : 0);
    float* sums = arena.take<float>(blocks ? size * kPanel * width : 0);
    Scratch* scratch = scratches(arena, std::max(padded, joined));
    std::vector<const Sequence*> owner;
    for (const Sequence& sequence : attention.sequences) {
      owner.insert(owner.end(), sequence.count, &sequence);
    }

    Queue qkv_queue, packing_queue, piece_queue, block_queue, out_queue;
    qkv_queue.reset(qkv->panels(), size);
    packing_queue.reset(static_cast<int64_t>(attention.packings.size()), size);
    piece_queue.reset(static_cast<int64_t>(attention.pieces.size()), size);
    block_queue.reset(static_cast<int64_t>(attention.blocks.size()), size);
    out_queue.reset(out->panels(), size);
    const float* cosine = step.cosines.const_data_ptr<float>();
    const float* sine = step.sines.const_data_ptr<float>();
    together([&](const Member& me) {
      const Tiles tiles(uses_tiles);
      left_rows(x, &norm, left, me.begin(tokens), me.end(tokens));
      me.wait();
      qkv_queue.run(me, [&](int64_t panel) {
        qkv->multiply_panel(panel, left, tokens, scratch[me.index], rows);
      });
      me.wait();
      const int64_t vectors = heads() + 2 * kv_heads();
      for (int64_t i = me.begin(tokens * vectors); i < me.end(tokens * vectors); ++i) {
        const int64_t token = i / vectors;
        place(
            attention, *owner[token], token, i % vectors, rows + i * dim, cosine + token * dim,
            sine + token * dim, queries);
      }
      for (int64_t t = me.begin(tokens); t < me.end(tokens); ++t) {
        bf16* row = found.wide + t * joined;
        std::fill(row + heads() * dim, row + joined, bf16{0});
      }
      me.wait();
      packing_queue.run(me, [&](int64_t i) {
        attention.pack(attention.packings[i], spaces + me.index * space_size);
      });
      piece_queue.run(me, [&](int64_t i) {
        attention.attend_piece(
            attention.pieces[i], spaces + me.index * space_size,
            chances + me.index * (most + 4) * (kPiece / 2));
      });
      me.wait();
      const Attention::BlockScratch space{
          scores + me.index * kPanel * kSpan, softened + me.index * kPanel * kSpan,
          sums + me.index * kPanel * width};
      block_queue.run(
          me, [&](int64_t i) { attention.attend_block(attention.blocks[i], space); });
      join(attention, me, uses_tiles);
      me.wait();
      if (found.high != nullptr) {
        found.split(me.begin(tokens), me.end(tokens));
        me.wait();
      }
      typed(y, [&](auto* to) {
        out_queue.run(me, [&](int64_t panel) {
          out->multiply_panel(panel, found, tokens, scratch[me.index], to, adds);
        });
      });
    });
  }

 private:
  void set(
      Attention& attention, int64_t tokens, const Step& step, const Tensor& k_pool,
      const Tensor& v_pool) const {
    const auto& [starts, counts, tables, cosines, sines] = step;
    const int64_t sequences = starts.numel();
    TORCH_CHECK(
        starts.scalar_type() == at::kLong && counts.scalar_type() == at::kLong &&
            tables.scalar_type() == at::kInt && starts.is_contiguous() && counts.is_contiguous() &&
            tables.is_contiguous() && tables.dim() == 2 && counts.numel() == sequences &&
            tables.size(0) == sequences,
        "starts and counts must be int64, (S,), and tables int32, (S, B)");
    for (const Tensor* angles : {&cosines, &sines}) {
      TORCH_CHECK(
          angles->scalar_type() == at::kFloat && angles->is_contiguous() && angles->dim() == 2 &&
              angles->size(0) == tokens && angles->size(1) == dim,
          "cosines and sines must be float32, (T, ", dim, ")");
    }
    for (const Tensor* pool : {&k_pool, &v_pool}) {
      TORCH_CHECK(
          pool->dim() == 4 && pool->size(1) == kv_heads() && pool->size(3) == dim &&
              pool->is_contiguous(),
          "a cache must be contiguous, (blocks, ", kv_heads(), ", P, ", dim, ")");
      const auto type = pool->scalar_type();
      TORCH_CHECK(
          type == at::kBFloat16 || type == at::kFloat || type == at::kFloat8_e4m3fn,
          "a cache must be bfloat16, float8_e4m3fn or float32");
    }
    attention.first_head = first_head;
    attention.dim = dim;
    attention.width = round_up(dim, 32);
    attention.window = window;
    attention.scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const int64_t* start = starts.const_data_ptr<int64_t>();
    const int64_t* count = counts.const_data_ptr<int64_t>();
    const int32_t* table = tables.const_data_ptr<int32_t>();
    int64_t token = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t first = window == 0 ? 0 : std::max<int64_t>(0, start[s] + 1 - window);
      const int32_t* blocks = table + s * tables.size(1);
      TORCH_CHECK(count[s] >= 1 && start[s] >= 0, "sequence ", s, " has no new token");
      TORCH_CHECK(
          start[s] + count[s] <= tables.size(1) * k_pool.size(2), "sequence ", s,
          " is longer than its table");
      for (int64_t p = first / k_pool.size(2); p * k_pool.size(2) < start[s] + count[s]; ++p) {
        TORCH_CHECK(
            blocks[p] >= 0 && blocks[p] < k_pool.size(0), "sequence ", s, " names block ", blocks[p],
            " of ", k_pool.size(0));
      }
      attention.sequences.push_back({token, start[s], count[s], blocks, first});
      token += count[s];
    }
    TORCH_CHECK(token == tokens, "counts sum to ", token, ", but there are ", tokens, " tokens");
  }

  // One head's vector of one token: normed and turned; a query is kept, keys and values cached.
  void place(
      const Attention& attention, const Sequence& sequence, int64_t token, int64_t vector, float* v,
      const float* cosine, const float* sine, bf16* queries) const {
    const int64_t position = sequence.start + token - sequence.token;
    const bool is_query = vector < heads(), is_key = !is_query && vector < heads() + kv_heads();
    if (is_query || is_key) {
      const std::optional<Tensor>& weight = is_query ? q_norm : k_norm;
      if (weight.has_value()) {
        norm_head(v, weight->const_data_ptr<float>());
      }
      turn(v, cosine, sine);
    }
    if (is_query) {
      bf16* to = queries + (token * heads() + vector) * attention.width;
      for (int64_t c = 0; c < attention.width; c += 16) {
        store16(to + c, 0xffff, load16(v + c, c < dim ? first16(dim - c) : 0));
      }
      return;
    }
    const Pool& pool = is_key ? attention.keys : attention.values;
    pool.write(
        sequence.table, is_key ? vector - heads() : vector - heads() - kv_heads(), position, v);
  }

  void norm_head(float* v, const float* weight) const {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < dim; c += 16) {
      const __m512 part = load16(v + c, first16(dim - c));
      squares = _mm512_fmadd_ps(part, part, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(dim);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + static_cast<float>(norm.eps)));
    for (int64_t c = 0; c < dim; c += 16) {
      const __mmask16 mask = first16(dim - c);
      const __m512 part = _mm512_mul_ps(load16(v + c, mask), factor);
      store16(v + c, mask, _mm512_mul_ps(part, load16(weight + c, mask)));
    }
  }

  // Turns each pair (c, c + C/2).
  void turn(float* v, const float* cosine, const float* sine) const {
    const int64_t half = dim / 2;
    for (int64_t c = 0; c < half; c += 16) {
      const __mmask16 mask = first16(half - c);
      const __m512 a = load16(v + c, mask), b = load16(v + half + c, mask);
      const __m512 low = _mm512_fnmadd_ps(
          b, load16(sine + c, mask), _mm512_mul_ps(a, load16(cosine + c, mask)));
      const __m512 high = _mm512_fmadd_ps(
          a, load16(sine + half + c, mask), _mm512_mul_ps(b, load16(cosine + half + c, mask)));
      store16(v + c, mask, low);
      store16(v + half + c, mask, high);
    }
  }

  void join(const Attention& attention, const Member& me, bool uses_tiles) const {
    for (size_t s = 0; s < attention.sequences.size(); ++s) {
      const Sequence& sequence = attention.sequences[s];
      if (uses_tiles && !sequence.is_few()) {
        continue;
      }
      const int64_t items = sequence.count * heads();
      for (int64_t i = me.begin(items); i < me.end(items); ++i) {
        const int64_t head = i % heads();
        const int64_t kv_head =
            std::upper_bound(first_head.begin(), first_head.end(), head) - first_head.begin() - 1;
        attention.join(
            sequence, static_cast<int64_t>(s), sequence.token + i / heads(), head, kv_head);
      }
    }
  }
};

// All layers of a model that one rank holds alone.
struct Layers : CustomClassHolder {
  std::vector<c10::intrusive_ptr<AttentionHalf>> attention;
  std::vector<c10::intrusive_ptr<ExpertsHalf>> experts;
  std::vector<c10::intrusive_ptr<DenseHalf>> dense;

  void add_experts(c10::intrusive_ptr<AttentionHalf> first, c10::intrusive_ptr<ExpertsHalf> second) {
    attention.push_back(std::move(first));
    experts.push_back(std::move(second));
    dense.emplace_back();
  }
  void add_dense(c10::intrusive_ptr<AttentionHalf> first, c10::intrusive_ptr<DenseHalf> second) {
    attention.push_back(std::move(first));
    experts.emplace_back();
    dense.push_back(std::move(second));
  }

  // Adds to x what every layer makes of it; the experts chosen, layer by layer.
  std::vector<Tensor> forward(
      const Tensor& x, const Tensor& starts, const Tensor& counts, const Tensor& tables,
      const Tensor& cosines, const Tensor& sines, const std::vector<Tensor>& k_pools,
      const std::vector<Tensor>& v_pools) {
    TORCH_CHECK(
        k_pools.size() == attention.size() && v_pools.size() == attention.size(), "there are ",
        attention.size(), " layers, but not as many caches");
    Tensor stream = x;
    std::vector<Tensor> chosen;
    for (size_t layer = 0; layer < attention.size(); ++layer) {
      check_x(x, attention[layer]->qkv->cols);
      attention[layer]->compute(
          x, {starts, counts, tables, cosines, sines}, k_pools[layer], v_pools[layer], stream, true);
      if (dense[layer].defined()) {
        dense[layer]->compute(x, stream, true);
      } else {
        chosen.push_back(experts[layer]->compute(x, stream, true));
      }
    }
    return chosen;
  }
};

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}

// For measurements: reads every byte once, as fast as memory gives it.
int64_t read_all(const Tensor& data) {
  TORCH_CHECK(data.is_contiguous(), "contiguous memory is needed");
  const auto* from = static_cast<const char*>(data.const_data_ptr());
  constexpr int64_t kRun = 1 << 20; // bytes of an item, read from four places at once
  const int64_t items = static_cast<int64_t>(data.nbytes()) / kRun;
  std::atomic<int64_t> total{0};
  Queue queue;
  queue.reset(items, team_size());
  together([&](const Member& me) {
    __m512i sums[4] = {};
    queue.run(me, [&](int64_t item) {
      const char* run = from + item * kRun;
      for (int64_t i = 0; i < kRun / 4; i += 64) {
        for (int64_t stream = 0; stream < 4; ++stream) {
          const char* p = run + stream * kRun / 4 + i;
          _mm_prefetch(p + kAhead, _MM_HINT_T0);
          sums[stream] = _mm512_add_epi64(sums[stream], _mm512_loadu_si512(p));
        }
      }
    });
    const __m512i sum = _mm512_add_epi64(
        _mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
    total += _mm512_reduce_add_epi64(sum);
  });
  return total;
}

// For tests and measurements: whether tiles are used where the processor has them.
void use_tiles(bool wanted) {
  tiles_wanted().store(wanted);
}

} // namespace
} // namespace moesaic

TORCH_LIBRARY(moesaic_serving, m) {
  using namespace moesaic;
  using Optional = std::optional<Tensor>;
  m.class_<Matrix>("Matrix")
      .def(torch::init<Tensor, Optional, Optional, int64_t, int64_t, int64_t>());
  m.class_<Experts>("Experts")
      .def(torch::init<Tensor, Optional, Tensor, Optional, int64_t, int64_t, int64_t, int64_t>());
  m.class_<AttentionHalf>("AttentionHalf")
      .def(torch::init<
           Tensor, double, MatrixPtr, MatrixPtr, const std::vector<int64_t>&, int64_t, Optional,
           Optional, int64_t>())
      .def("forward", &AttentionHalf::forward);
  m.class_<ExpertsHalf>("ExpertsHalf")
      .def(torch::init<
           Tensor, double, Tensor, Optional, int64_t, bool, double, double, ExpertsPtr, int64_t,
           std::optional<ExpertsPtr>, Optional>())
      .def("forward", &ExpertsHalf::forward);
  m.class_<DenseHalf>("DenseHalf")
      .def(torch::init<Tensor, double, ExpertsPtr>())
      .def("forward", &DenseHalf::forward);
  m.class_<Layers>("Layers")
      .def(torch::init<>())
      .def("add_experts", &Layers::add_experts)
      .def("add_dense", &Layers::add_dense)
      .def("forward", &Layers::forward);
  m.class_<HeadHalf>("HeadHalf")
      .def(torch::init<Tensor, double, MatrixPtr>())
      .def("forward", &HeadHalf::forward);
  m.def("is_supported() -> bool", is_supported);
  m.def("use_tiles(bool wanted) -> ()", use_tiles);
  m.def("pack(Tensor weight) -> Tensor", pack);
  m.def("empty_weights(int[] sizes, Tensor like) -> Tensor", empty_weights);
  m.def("read(Tensor data) -> int", read_all);
  m.def("linear", linear);
  m.def("experts", experts);
}
