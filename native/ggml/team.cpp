#include "team.h"

namespace losa::ggml {
namespace {

constexpr int kSpins = 20000;  // some tens of microseconds: the next node of a token comes sooner

// Spin for a while, then let others run; true if the condition came while spinning.
template <typename Condition>
bool spin(Condition condition) {
  for (int i = 0; i < kSpins; ++i) {
    if (condition()) {
      return true;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return condition();
}

}  // namespace

Threads::Threads(int count) : count_(count < 1 ? 1 : count) {
  for (int i = 1; i < count_; ++i) {
    threads_.emplace_back([this, i] { serve(i); });
  }
}

Threads::~Threads() {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    stop_ = true;
    round_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto &thread : threads_) {
    thread.join();
  }
}

void Threads::run(const Work &work) {
  if (count_ > 1) {
    const std::lock_guard<std::mutex> lock(guard_);
    work_ = &work;
    round_.fetch_add(1);
    wake_.notify_all();
  }
  work(0, count_);
  wait_for_all();
}

void Threads::wait_for_all() {
  const int before = passed_.load();
  if (arrived_.fetch_add(1) + 1 == count_) {
    arrived_.store(0);
    passed_.fetch_add(1);
    return;
  }
  while (!spin([&] { return passed_.load() != before; })) {
    std::this_thread::yield();
  }
}

void Threads::serve(int thread) {
  for (uint64_t seen = 0;;) {
    const auto called = [&] { return round_.load() != seen; };
    if (!spin(called)) {
      std::unique_lock<std::mutex> lock(guard_);
      wake_.wait(lock, called);
    }
    seen = round_.load();
    if (stop_) {
      return;
    }
    (*work_)(thread, count_);
    wait_for_all();
  }
}

}  // namespace losa::ggml
