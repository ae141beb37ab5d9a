// measure_rate.h: how the calibrations time a loop on several threads at once.
#ifndef DLRM_DEPLOY_CALIBRATE_MEASURE_RATE_H_
#define DLRM_DEPLOY_CALIBRATE_MEASURE_RATE_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <thread>
#include <vector>

namespace dlrm_deploy {

// Runs step(thread) on every thread, again and again for the duration; a step returns how much work
// it did. Returns the work a second of all threads together. They begin at the same moment.
template <typename Step>
double MeasureRate(int threads, double duration_ms, const Step& step) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> ready{0};
  std::atomic<bool> cancelled{false};
  std::vector<double> rates(static_cast<size_t>(threads), 0.0);
  const auto run = [&](int thread) {
    ready.fetch_add(1);
    while (ready.load() < threads && !cancelled.load()) std::this_thread::yield();
    const Clock::time_point start = Clock::now();
    double work = 0.0;
    double seconds = 0.0;
    do {
      work += step(thread);
      seconds = std::chrono::duration<double>(Clock::now() - start).count();
    } while (seconds * 1e3 < duration_ms && !cancelled.load());
    rates[static_cast<size_t>(thread)] = work / seconds;
  };
  std::vector<std::thread> others;
  try {
    for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
    run(0);
  } catch (...) {
    cancelled.store(true);
    for (std::thread& other : others) other.join();
    throw;
  }
  for (std::thread& other : others) other.join();
  double total = 0.0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace dlrm_deploy

#endif  // DLRM_DEPLOY_CALIBRATE_MEASURE_RATE_H_
