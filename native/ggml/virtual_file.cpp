// A file that exists only as a way to read another one: the standard view of a packed GGUF.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "plugin.h"

namespace {

struct View {
  int file;
  std::vector<uint8_t> header;
  std::vector<losa_ggml_piece> pieces;
  uint64_t total, at = 0;

  ~View() {
    if (file >= 0) {
      close(file);
    }
  }
};

// Ascending, without overlap, behind the header, inside of the view and of the file.
bool is_sound(const View &view, uint64_t file_bytes) {
  uint64_t end = view.header.size();
  for (const losa_ggml_piece &p : view.pieces) {
    if (p.at < end || p.at > view.total || p.bytes > view.total - p.at || p.offset > file_bytes ||
        p.bytes > file_bytes - p.offset) {
      return false;
    }
    end = p.at + p.bytes;
  }
  return end <= view.total;
}

// Reads all of it or fails: a file that became shorter meanwhile is an error, not zeros.
bool read_all(int file, uint8_t *out, uint64_t bytes, uint64_t offset) {
  while (bytes > 0) {
    const ssize_t got = pread(file, out, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      errno = got == 0 ? EIO : errno;
      return false;
    }
    out += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
  return true;
}

bool read_range(const View &view, uint8_t *out, uint64_t begin, uint64_t bytes) {
  std::memset(out, 0, bytes);
  const uint64_t end = begin + bytes;
  if (begin < view.header.size()) {
    std::memcpy(out, view.header.data() + begin, std::min<uint64_t>(end, view.header.size()) - begin);
  }
  auto piece = std::partition_point(view.pieces.begin(), view.pieces.end(),
                                    [&](const losa_ggml_piece &p) { return p.at + p.bytes <= begin; });
  for (; piece != view.pieces.end() && piece->at < end; ++piece) {
    const uint64_t first = std::max(begin, piece->at), last = std::min(end, piece->at + piece->bytes);
    if (!read_all(view.file, out + (first - begin), last - first, piece->offset + (first - piece->at))) {
      return false;
    }
  }
  return true;
}

ssize_t read_view(void *cookie, char *out, size_t bytes) {
  View &view = *static_cast<View *>(cookie);
  const uint64_t here = view.at < view.total ? std::min<uint64_t>(bytes, view.total - view.at) : 0;
  if (!read_range(view, reinterpret_cast<uint8_t *>(out), view.at, here)) {
    return -1;
  }
  view.at += here;
  return static_cast<ssize_t>(here);
}

// The position that `offset` means from the start, the place or the end; -1 if it is before the start.
int64_t seek_view(void *cookie, int64_t offset, int whence) {
  View &view = *static_cast<View *>(cookie);
  const uint64_t from = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? view.at : view.total;
  const int64_t place = static_cast<int64_t>(from) + offset;
  if (place < 0) {
    errno = EINVAL;
    return -1;
  }
  view.at = static_cast<uint64_t>(place);
  return place;
}

int close_view(void *cookie) {
  delete static_cast<View *>(cookie);
  return 0;
}

FILE *open_view(View *view) {
#ifdef __APPLE__
  return funopen(
      view,
      [](void *cookie, char *out, int bytes) {
        return static_cast<int>(read_view(cookie, out, static_cast<size_t>(bytes)));
      },
      nullptr,
      [](void *cookie, fpos_t offset, int whence) -> fpos_t { return seek_view(cookie, offset, whence); },
      close_view);
#else
  cookie_io_functions_t calls = {};
  calls.read = read_view;
  calls.seek = [](void *cookie, off64_t *offset, int whence) {
    const int64_t place = seek_view(cookie, *offset, whence);
    *offset = place;
    return place < 0 ? -1 : 0;
  };
  calls.close = close_view;
  return fopencookie(view, "rb", calls);
#endif
}

}  // namespace

extern "C" void *losa_ggml_virtual_open(const char *path, const uint8_t *header, uint64_t header_bytes,
                                        const losa_ggml_piece *pieces, uint64_t count, uint64_t total_bytes) {
  try {
    auto view = std::make_unique<View>();
    view->file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat facts = {};
    if (view->file < 0 || fstat(view->file, &facts) != 0) {
      return nullptr;
    }
    view->header.assign(header, header + header_bytes);
    view->pieces.assign(pieces, pieces + count);
    view->total = total_bytes;
    if (!is_sound(*view, static_cast<uint64_t>(facts.st_size))) {
      errno = EINVAL;
      return nullptr;
    }
    FILE *file = open_view(view.get());
    if (file != nullptr) {
      view.release();
    }
    return file;
  } catch (const std::exception &) {
    errno = ENOMEM;
    return nullptr;
  }
}

extern "C" void losa_ggml_virtual_close(void *file) {
  if (file != nullptr) {
    fclose(static_cast<FILE *>(file));
  }
}
