// Threads that work through the phases of one operation together.
//
// A parallel region is opened once for an operation, not once for each of its phases: between
// phases threads meet at a barrier that spins, which takes a fraction of a microsecond.

#pragma once

#include <ATen/Parallel.h>
#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moesaic {

constexpr int kMostThreads = 64;

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      // Where there are more threads than cores, whoever is waited for needs this one's.
      if (spins < kSpins) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
};

// One thread of the team.
struct Member {
  int index;
  int size;
  Barrier* barrier;

  void wait() const {
    if (size > 1) {
      barrier->wait();
    }
  }
  bool leads() const {
    return index == 0;
  }
  int64_t begin(int64_t total) const {
    return total * index / size;
  }
  int64_t end(int64_t total) const {
    return total * (index + 1) / size;
  }
};

template <typename Work>
void together(const Work& work) {
  const int threads = std::min(at::get_num_threads(), kMostThreads);
  if (threads == 1 || omp_in_parallel()) {
    work(Member{0, 1, nullptr});
    return;
  }
  alignas(64) char place[sizeof(Barrier)];
  Barrier* barrier = nullptr;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    // The runtime may give fewer threads than were asked for.
    barrier = new (place) Barrier(omp_get_num_threads());
    work(Member{omp_get_thread_num(), omp_get_num_threads(), barrier});
  }
}

// Items dealt out in equal runs, so that a thread reads memory in order; a thread that is done
// takes what is left of the others' runs.
class Queue {
 public:
  // Called by one thread, before a barrier.
  void reset(int64_t total, int size) {
    size_ = size;
    for (int i = 0; i < size; ++i) {
      parts_[i].next.store(total * i / size, std::memory_order_relaxed);
      parts_[i].end = total * (i + 1) / size;
    }
  }

  template <typename Work>
  void run(const Member& me, const Work& work) {
    // Every run is visited, also where fewer threads came than runs were made for.
    for (int step = 0; step < size_; ++step) {
      Part& part = parts_[(me.index + step) % size_];
      for (int64_t item = part.next.fetch_add(1, std::memory_order_relaxed); item < part.end;
           item = part.next.fetch_add(1, std::memory_order_relaxed)) {
        work(item);
      }
    }
  }

 private:
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Part parts_[kMostThreads];
  int size_ = 0;
};

} // namespace moesaic
