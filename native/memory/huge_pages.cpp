#include "memory/huge_pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "losa/kernels.h"
#endif

namespace losa::huge_pages {

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kBlock = 16 * kHugePage;   // small weights share a block
constexpr size_t kLeast = size_t{1} << 16;  // bytes; fewer stay where they are

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// The number after `key` at the start of a line, or `otherwise`.
uint64_t number_in(const char *file, std::string_view key, uint64_t otherwise) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, key.size(), key) == 0) {
      char *end = nullptr;
      const char *begin = line.c_str() + key.size();
      const uint64_t number = std::strtoull(begin, &end, 10);
      return end == begin ? otherwise : number;
    }
  }
  return otherwise;
}

bool are_offered() {
  const char *variable = std::getenv("LOSA_HUGE_PAGES");
  if (variable != nullptr && std::string_view(variable) == "0") {
    return false;
  }
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  return std::getline(file, modes) && modes.find("[never]") == std::string::npos;
}

// Would `bytes` more leave a quarter of the memory, of the machine and of the container, to others?
bool affordable(uint64_t bytes) {
  constexpr const char *kMachine = "/proc/meminfo", *kLimit = "/sys/fs/cgroup/memory.max";
  const uint64_t total = 1024 * number_in(kMachine, "MemTotal:", 0);
  const uint64_t available = 1024 * number_in(kMachine, "MemAvailable:", 0);
  if (available < bytes + total / 4) {
    return false;
  }
  const uint64_t limit = number_in(kLimit, "", UINT64_MAX);  // "max" is no number
  const uint64_t used = number_in("/sys/fs/cgroup/memory.stat", "anon ", 0);
  return limit == UINT64_MAX || used + bytes + limit / 4 <= limit;
}

// Memory that is mapped at a huge page's boundary and unmapped with the last weight in it.
class Block {
 public:
  explicit Block(size_t bytes) : size_(bytes + kHugePage) {
    void *mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
      return;
    }
    mapped_ = static_cast<uint8_t *>(mapped);
    const size_t skipped =
        round_up(reinterpret_cast<uintptr_t>(mapped_), kHugePage) - reinterpret_cast<uintptr_t>(mapped_);
    next_ = mapped_ + skipped;
    end_ = next_ + bytes;
    if (madvise(next_, bytes, MADV_HUGEPAGE) != 0) {
      end_ = next_;
    }
  }
  Block(const Block &) = delete;
  Block &operator=(const Block &) = delete;
  ~Block() {
    if (mapped_ != nullptr) {
      munmap(mapped_, size_);
    }
  }

  // Null if there is no room.
  uint8_t *take(size_t bytes) {
    if (static_cast<size_t>(end_ - next_) < bytes) {
      return nullptr;
    }
    uint8_t *taken = next_;
    next_ += bytes;
    return taken;
  }

 private:
  size_t size_;
  uint8_t *mapped_ = nullptr, *next_ = nullptr, *end_ = nullptr;
};

// Are so many bytes wanted in huge pages?
bool wanted(size_t bytes) {
  static const bool offered = are_offered();
  return offered && bytes >= kLeast;
}

std::shared_ptr<uint8_t> take_from_block(size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Block> last;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Block> block = last.lock();
  uint8_t *memory = block == nullptr ? nullptr : block->take(bytes);
  if (memory == nullptr) {
    const size_t size = std::max(kBlock, round_up(bytes, kHugePage));
    if (!affordable(size)) {
      return nullptr;
    }
    block = std::make_shared<Block>(size);
    memory = block->take(bytes);
    last = block;
  }
  return memory == nullptr ? nullptr : std::shared_ptr<uint8_t>(block, memory);
}

// The whole pages among some bytes.
struct Pages {
  Pages(const void *data, size_t bytes) : size(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    first = round_up(address, size) / size;
    const size_t end = (address + bytes) / size;
    count = end > first ? end - first : 0;
  }

  uint8_t *at(size_t page) const { return reinterpret_cast<uint8_t *>((first + page) * size); }

  size_t size, first, count;
};

// True if every page is a file's as it was mapped, and none the program's own. Reads all of them.
bool are_of_file(const Pages &pages) {
  constexpr uint64_t kPresent = uint64_t{1} << 63, kFile = uint64_t{1} << 61;
  for (size_t i = 0; i < pages.count; ++i) {
    (void)*static_cast<volatile uint8_t *>(pages.at(i));
  }
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) {
    return false;
  }
  std::vector<uint64_t> entries(pages.count);
  const size_t bytes = entries.size() * sizeof(uint64_t);
  const auto offset = static_cast<off_t>(pages.first * sizeof(uint64_t));
  const bool read = pread(pagemap, entries.data(), bytes, offset) == static_cast<ssize_t>(bytes);
  close(pagemap);
  return read && pages.count != 0 && std::all_of(entries.begin(), entries.end(), [](uint64_t entry) {
           return (entry & kPresent) && (entry & kFile);
         });
}

}  // namespace

std::shared_ptr<uint8_t> take(size_t bytes) {
  return wanted(bytes) ? take_from_block(round_up(bytes, LOSA_ALIGNMENT)) : nullptr;
}

std::shared_ptr<const uint8_t> move_mapped(const void *data, size_t bytes) {
  const std::shared_ptr<uint8_t> memory = take(bytes);
  if (memory != nullptr) {
    const Pages pages(data, bytes);
    std::memcpy(memory.get(), data, bytes);
    madvise(pages.at(0), pages.count * pages.size, MADV_DONTNEED);
  }
  return memory;
}

std::shared_ptr<const uint8_t> move_if_mapped(const void *data, size_t bytes) {
  return wanted(bytes) && are_of_file(Pages(data, bytes)) ? move_mapped(data, bytes) : nullptr;
}
#else
std::shared_ptr<uint8_t> take(size_t) { return nullptr; }
std::shared_ptr<const uint8_t> move_mapped(const void *, size_t) { return nullptr; }
std::shared_ptr<const uint8_t> move_if_mapped(const void *, size_t) { return nullptr; }
#endif

}  // namespace losa::huge_pages
