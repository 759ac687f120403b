// Hands out pieces to the threads of the accelerator route, many rounds of them: for a sanitizer.
//
//   run_team THREADS ROUNDS
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "team.h"

namespace {

// Every piece is done once, by a thread that exists, and its result is there when the round ends.
bool round_is_right(losa::ggml::Threads &team, size_t pieces, std::vector<size_t> &busy) {
  std::vector<size_t> results(pieces);  // not atomic: the end of a round must make them visible
  const size_t bias = pieces;           // as on the stack of a caller whose round is over
  team.run(pieces, [&](size_t piece, size_t thread) {
    ++busy.at(thread);  // no two threads have the same number
    results.at(piece) += piece + bias;
  });
  for (size_t i = 0; i < pieces; ++i) {
    if (results[i] != i + bias) {
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_team THREADS ROUNDS\n");
    return 2;
  }
  losa::ggml::Threads team(std::atoi(argv[1]));
  std::vector<size_t> busy(static_cast<size_t>(team.count()));
  size_t expected = 0;
  for (int round = 0; round < std::atoi(argv[2]); ++round) {
    const auto pieces = static_cast<size_t>(round % 40);
    expected += pieces;
    if (!round_is_right(team, pieces, busy)) {
      std::fprintf(stderr, "round %d: a piece was not done once\n", round);
      return 1;
    }
  }
  const size_t done = std::accumulate(busy.begin(), busy.end(), size_t{0});
  std::printf("%zu of %zu pieces, %zu by helpers\n", done, expected, done - busy[0]);
  return done == expected ? 0 : 1;
}
