// Threads of the accelerator route, which has no access to those of the CPU backend.
#ifndef LOSA_GGML_TEAM_H
#define LOSA_GGML_TEAM_H

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace losa::ggml {

class Threads {
 public:
  using Work = std::function<void(int thread, int threads)>;

  explicit Threads(int count);
  ~Threads();
  Threads(const Threads &) = delete;
  Threads &operator=(const Threads &) = delete;

  int count() const { return count_; }
  // Run work in every thread, the caller's being the first; returns when all are done.
  void run(const Work &work);
  // Inside of work: wait until every thread is here.
  void wait_for_all();

 private:
  void serve(int thread);

  const int count_;
  std::mutex guard_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> arrived_{0}, passed_{0};
  const Work *work_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace losa::ggml

#endif
