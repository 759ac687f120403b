#include "team.h"

namespace losa::ggml {

Threads::Threads(int count) {
  for (int i = 1; i < count; ++i) {
    threads_.emplace_back([this, i] { serve(static_cast<size_t>(i)); });
  }
}

Threads::~Threads() {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto &thread : threads_) {
    thread.join();
  }
}

void Threads::run(size_t pieces, const Work &work) {
  if (pieces < 2 || threads_.empty()) {  // not worth a wake
    for (size_t piece = 0; piece < pieces; ++piece) {
      work(piece, 0);
    }
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(guard_);
    work_ = &work;
    pieces_ = pieces;
    next_.store(0, std::memory_order_relaxed);
    open_ = true;
    ++round_;
  }
  wake_.notify_all();
  take_pieces(0);
  {
    const std::lock_guard<std::mutex> lock(guard_);
    open_ = false;  // from here on nobody joins
  }
  // What helpers still do is a piece each.
  while (inside_.load(std::memory_order_acquire) != 0) {
    std::this_thread::yield();
  }
}

void Threads::take_pieces(size_t thread) {
  for (size_t piece; (piece = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) {
    (*work_)(piece, thread);
  }
}

void Threads::serve(size_t thread) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(guard_);
  for (;;) {
    // Asleep, not spinning: a thread that has slept is preferred to one that spins when it wakes.
    wake_.wait(lock, [&] { return stop_ || (open_ && round_ != seen); });
    if (stop_) {
      return;
    }
    seen = round_;
    inside_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    take_pieces(thread);
    inside_.fetch_sub(1, std::memory_order_release);
    lock.lock();
  }
}

}  // namespace losa::ggml
