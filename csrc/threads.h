// Rows are independent: threads take blocks of them from a counter. Which thread takes which block
// changes nothing about the result, so the bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace sod_mcore {

// Runs `work(begin, end)` over blocks of [0, num_rows) on at most `num_threads` threads, this one
// included. `values_per_row` says how much there is to do: too little is done by this thread alone.
template <typename Work>
void for_rows(std::int64_t num_rows, std::int64_t values_per_row, int num_threads, Work work) {
  constexpr std::int64_t kValuesPerBlock = 1 << 18;  // some 100 us
  const std::int64_t rows_per_block =
      std::max<std::int64_t>(1, kValuesPerBlock / std::max<std::int64_t>(1, values_per_row));
  const std::int64_t num_blocks = (num_rows + rows_per_block - 1) / rows_per_block;
  const std::int64_t workers = std::min<std::int64_t>(num_threads, num_blocks);
  if (workers <= 1) {
    if (num_rows > 0) work(std::int64_t{0}, num_rows);
    return;
  }
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto take_blocks = [&] {
    try {
      for (std::int64_t block = next++; block < num_blocks; block = next++)
        work(block * rows_per_block, std::min(num_rows, (block + 1) * rows_per_block));
    } catch (...) { // memory ran out; it must not leave a thread
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(workers - 1));
  try {
    for (std::int64_t i = 1; i < workers; ++i) threads.emplace_back(take_blocks);
  } catch (const std::system_error &) { // the system gives no more: those that run do the work
  }
  take_blocks();
  for (std::thread &thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

} // namespace sod_mcore
