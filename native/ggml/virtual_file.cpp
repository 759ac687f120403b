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

#include "losa/kernels.h"
#include "mapping.h"
#include "plugin.h"

namespace {

// glibc reads such files by the bufferful, however much is asked for; after a seek the buffer is filled anew.
constexpr size_t kBuffer = size_t{1} << 16;

// Of a blob only the header is shown, which refers to the mapping; what follows it in the view is zero.
struct Piece : losa_ggml_piece {
  bool blob;
  uint64_t shown;
};

struct View {
  int file;
  std::vector<uint8_t> header;
  std::vector<Piece> pieces;
  uint64_t total, at = 0;
  std::shared_ptr<losa::ggml::Mapping> mapping;

  ~View() {
    if (file >= 0) {
      close(file);
    }
  }
};

bool lies_in_file(const losa_ggml_piece &p, uint64_t file_bytes) {
  return p.offset <= file_bytes && p.bytes <= file_bytes - p.offset;
}

// Ascending, without overlap, behind the header, inside of the view.
bool is_sound(const View &view) {
  uint64_t end = view.header.size();
  for (const Piece &p : view.pieces) {
    if (p.at < end || p.at > view.total || p.shown > view.total - p.at) {
      return false;
    }
    end = p.at + p.shown;
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
  const uint64_t end = begin + bytes;
  uint64_t done = begin;  // up to here `out` is written
  if (begin < view.header.size()) {
    done = std::min<uint64_t>(end, view.header.size());
    std::memcpy(out, view.header.data() + begin, done - begin);
  }
  auto piece = std::partition_point(view.pieces.begin(), view.pieces.end(),
                                    [&](const Piece &p) { return p.at + p.shown <= begin; });
  for (; piece != view.pieces.end() && piece->at < end; ++piece) {
    const uint64_t first = std::max(begin, piece->at), last = std::min(end, piece->at + piece->shown);
    std::memset(out + (done - begin), 0, first - done);
    done = last;
    if (piece->blob) {
      uint8_t shown[LOSA_HEADER_BYTES];
      losa::ggml::refer(*view.mapping, piece->offset, piece->bytes, shown);
      std::memcpy(out + (first - begin), shown + (first - piece->at), last - first);
    } else if (!read_all(view.file, out + (first - begin), last - first,
                         piece->offset + (first - piece->at))) {
      return false;
    }
  }
  std::memset(out + (done - begin), 0, end - done);
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
    const auto file_bytes = static_cast<uint64_t>(facts.st_size);
    view->header.assign(header, header + header_bytes);
    view->total = total_bytes;
    view->mapping = losa::ggml::Mapping::of(view->file, file_bytes);
    if (!view->mapping) {
      return nullptr;
    }
    for (const losa_ggml_piece *p = pieces; p != pieces + count; ++p) {
      if (!lies_in_file(*p, file_bytes)) {
        errno = EINVAL;
        return nullptr;
      }
      const bool blob = losa::ggml::starts_as_blob(view->mapping->data() + p->offset, p->bytes);
      view->pieces.push_back({*p, blob, blob ? uint64_t{LOSA_HEADER_BYTES} : p->bytes});
    }
    if (!is_sound(*view)) {
      errno = EINVAL;
      return nullptr;
    }
    FILE *file = open_view(view.get());
    if (file != nullptr) {
      setvbuf(file, nullptr, _IOFBF, kBuffer);
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
