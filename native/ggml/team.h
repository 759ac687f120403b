// Threads of the accelerator route, which has no access to those of the CPU backend.
//
// They share the cores with ggml's own threads, which spin for a while after their part of the graph. So work
// is cut in pieces: the caller takes one after another until none is left, threads that wake in time take
// some of them, and nobody waits for a thread that has not begun.
#ifndef LOSA_GGML_TEAM_H
#define LOSA_GGML_TEAM_H

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace losa::ggml {

class Threads {
 public:
  // Does a piece; `thread` is below count(), and no two threads have the same at a time.
  using Work = std::function<void(size_t piece, size_t thread)>;

  explicit Threads(int count);
  ~Threads();
  Threads(const Threads &) = delete;
  Threads &operator=(const Threads &) = delete;

  int count() const { return static_cast<int>(threads_.size()) + 1; }
  // Do all pieces; returns when they are done. One caller at a time.
  void run(size_t pieces, const Work &work);

 private:
  void serve(size_t thread);
  void take_pieces(size_t thread);

  std::mutex guard_;
  std::condition_variable wake_;
  // Under guard_.
  uint64_t round_ = 0;
  bool open_ = false, stop_ = false;  // open: helpers may join the round
  // Of the open round; written only while it is closed and nobody is inside.
  const Work *work_ = nullptr;
  size_t pieces_ = 0;
  std::atomic<size_t> next_{0};
  std::atomic<int> inside_{0};  // helpers that have joined
  std::vector<std::thread> threads_;
};

}  // namespace losa::ggml

#endif
