#include "engine.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <vector>

#include "check.h"
#include "error.h"
#include "isa.h"
#include "memory.h"
#include "plan.h"
#include "pool.h"
#include "table.h"
#include "workspace.h"

namespace bertrt {
namespace {

constexpr int kMostThreads = 1024;

size_t add(size_t a, size_t b) {
  if (a > std::numeric_limits<size_t>::max() / 2 - b) {
    throw Error(ErrorCode::kOutOfMemory, "the batch needs more memory than can be addressed; run smaller batches");
  }
  return a + b;
}

size_t times(size_t size, size_t count) {
  if (count != 0 && size > std::numeric_limits<size_t>::max() / 2 / count) {
    throw Error(ErrorCode::kOutOfMemory, "the batch needs more memory than can be addressed; run smaller batches");
  }
  return size * count;
}

size_t whole_lines(size_t bytes) { return add(bytes, 63) / 64 * 64; }

// Which outputs a request has.
struct Parts {
  explicit Parts(const Request& request)
      : states(request.hidden_states != nullptr || request.layers != nullptr),
        mlm(request.mlm_count > 0 && (request.mlm_logits != nullptr || request.top_k > 0 ||
                                      (request.candidate_count > 0 && request.candidate_log_probs != nullptr))),
        pool(request.pooled != nullptr || request.nsp_logits != nullptr) {}
  bool states, mlm, pool;
};

// The sequences that an output needs, in the batch's order.
std::vector<int64_t> needed(const Batch& batch, const std::vector<int64_t>& sequence_of_position, const Parts& parts) {
  std::vector<int64_t> numbers;
  if (parts.states || parts.pool) {
    numbers.resize(static_cast<size_t>(batch.sequences));
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int64_t>(i);
  } else {
    numbers = sequence_of_position;
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  }
  return numbers;
}

std::vector<int64_t> sequences_of_positions(const Batch& batch, const Request& request) {
  std::vector<int64_t> sequences(static_cast<size_t>(request.mlm_count));
  const int64_t* end = batch.offsets + batch.sequences + 1;
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i] = std::upper_bound(batch.offsets, end, request.mlm_positions[i]) - batch.offsets - 1;
  }
  return sequences;
}

// The rows that a head needs of each planned sequence: picks[start[i]] to picks[start[i + 1]] of the i-th.
struct Picks {
  std::vector<Pick> picks;
  std::vector<int64_t> start;

  // `place` maps a sequence's number in the batch to its place in the plan.
  static Picks of_positions(const Batch& batch, const Request& request, const Plan& plan,
                            const std::vector<int64_t>& sequence_of_position, const std::vector<int64_t>& place) {
    Picks result;
    result.start.assign(plan.sequences.size() + 1, 0);
    for (int64_t number : sequence_of_position)
      ++result.start[static_cast<size_t>(place[static_cast<size_t>(number)]) + 1];
    for (size_t i = 1; i < result.start.size(); ++i) result.start[i] += result.start[i - 1];
    std::vector<int64_t> next(result.start.begin(), result.start.end() - 1);
    result.picks.resize(sequence_of_position.size());
    for (size_t i = 0; i < sequence_of_position.size(); ++i) {
      const size_t number = static_cast<size_t>(sequence_of_position[i]), at = static_cast<size_t>(place[number]);
      const int64_t row = plan.sequences[at].row + request.mlm_positions[i] - batch.offsets[number];
      result.picks[static_cast<size_t>(next[at]++)] = {static_cast<int32_t>(row), static_cast<int64_t>(i)};
    }
    return result;
  }

  // The first token of each sequence.
  static Picks of_first_tokens(const Plan& plan) {
    Picks result;
    result.picks.resize(plan.sequences.size());
    result.start.resize(plan.sequences.size() + 1);
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      result.picks[i] = {plan.sequences[i].row, plan.numbers[i]};
      result.start[i + 1] = static_cast<int64_t>(i) + 1;
    }
    return result;
  }
};

// One run, as its threads see it.
struct Run {
  const Model& model;
  const KernelTable& table;
  const Batch& batch;
  const Request& request;
  const Parts parts;
  Plan plan;
  Picks mlm_picks{}, pool_picks{};

  // Parts of the run's memory. What one thread or the whole team computes with lies in the same place: they take turns.
  void* mlm_rows = nullptr;
  void* pooled_rows = nullptr;
  float* pooled_scratch = nullptr;       // of one block, where the pooled rows are not asked for
  char* chunks = nullptr;                // one for each member, or one for all
  size_t solo_bytes = 0;                 // of a member's chunk
  std::vector<ThreadBuffers> scratch{};  // of each member
  MlmBuffers mlm_buffers{};              // for the whole team
  std::vector<ChunkBuffers> solo_buffers{};
  ChunkBuffers shared_buffers{}, pool_buffers{};
  std::vector<std::atomic<size_t>> next{};  // chunk of each member's list that is to be taken

  void lay_out(char* memory, int team, size_t* bytes);
  Chunk chunk_of(const PlannedChunk& planned) const;
  void work(Group& team, int rank) noexcept;
  void compute_solo(int rank) noexcept;
  void compute_mlm(Group& team, int rank) noexcept;
  void compute_pool(Group& team, int rank) noexcept;
};

// Carves the run's memory, or only counts its bytes where `memory` is null.
void Run::lay_out(char* memory, int team, size_t* bytes) {
  const Architecture& sizes = model.architecture;
  const size_t members = static_cast<size_t>(team);
  size_t used = 0;
  const auto take = [&](size_t size) {
    char* part = memory == nullptr ? nullptr : memory + used;
    used = add(used, whole_lines(size));
    return part;
  };
  mlm_rows = take(parts.mlm ? gathered_bytes(sizes, request.mlm_count) : 0);
  pooled_rows = take(parts.pool ? gathered_bytes(sizes, batch.sequences) : 0);
  const bool needs_scratch = parts.pool && request.pooled == nullptr;
  pooled_scratch = reinterpret_cast<float*>(
      take(needs_scratch ? static_cast<size_t>(kHeadRows) * static_cast<size_t>(sizes.hidden) * sizeof(float) : 0));
  const size_t thread_size = whole_lines(thread_bytes(sizes, plan.longest));
  char* threads = take(times(thread_size, members));

  solo_bytes = plan.solo.empty() ? 0 : whole_lines(chunk_bytes(sizes, plan.solo_rows));
  size_t largest = times(solo_bytes, members);
  if (!plan.shared.empty()) largest = std::max(largest, chunk_bytes(sizes, plan.shared_rows));
  if (parts.mlm) largest = std::max(largest, mlm_bytes(sizes, team, request.top_k));
  if (parts.pool) largest = std::max(largest, chunk_bytes(sizes, kHeadRows));
  chunks = take(largest);
  *bytes = used;
  if (memory == nullptr) return;

  for (size_t rank = 0; rank < members; ++rank) {
    scratch.push_back(carve_thread(sizes, plan.longest, threads + rank * thread_size));
    if (!plan.solo.empty()) solo_buffers.push_back(carve_chunk(sizes, plan.solo_rows, chunks + rank * solo_bytes));
  }
  if (!plan.shared.empty()) shared_buffers = carve_chunk(sizes, plan.shared_rows, chunks);
  if (parts.mlm) mlm_buffers = carve_mlm(sizes, team, request.top_k, chunks);
  if (parts.pool) pool_buffers = carve_chunk(sizes, kHeadRows, chunks);
}

Chunk Run::chunk_of(const PlannedChunk& planned) const {
  const size_t first = static_cast<size_t>(planned.first), last = first + static_cast<size_t>(planned.count);
  Chunk chunk{};
  chunk.ids = batch.ids;
  chunk.segments = batch.segments;
  chunk.sequences = plan.sequences.data() + first;
  chunk.sequence_count = planned.count;
  chunk.rows = planned.rows;
  chunk.longest = planned.longest;
  chunk.hidden = request.hidden_states;
  chunk.layers = request.layers;
  chunk.tokens = batch.tokens;
  if (parts.mlm) {
    chunk.mlm = mlm_picks.picks.data() + mlm_picks.start[first];
    chunk.mlm_count = mlm_picks.start[last] - mlm_picks.start[first];
    chunk.mlm_rows = mlm_rows;
  }
  if (parts.pool) {
    chunk.pooled = pool_picks.picks.data() + pool_picks.start[first];
    chunk.pooled_count = pool_picks.start[last] - pool_picks.start[first];
    chunk.pooled_rows = pooled_rows;
  }
  return chunk;
}

// A member's own chunks, then what the others have not begun.
void Run::compute_solo(int rank) noexcept {
  Group alone(1);
  const size_t members = plan.solo.size(), self = static_cast<size_t>(rank);
  for (size_t step = 0; step < members; ++step) {
    const size_t owner = (self + step) % members;
    const std::vector<PlannedChunk>& list = plan.solo[owner];
    for (;;) {
      const size_t index = next[owner].fetch_add(1, std::memory_order_relaxed);
      if (index >= list.size()) break;
      table.encode(model, chunk_of(list[index]), solo_buffers[self], scratch[self], alone, 0);
    }
  }
}

void Run::compute_mlm(Group& team, int rank) noexcept {
  const Architecture& sizes = model.architecture;
  const size_t block_bytes = gathered_bytes(sizes, kHeadRows);
  for (int64_t first = 0; first < request.mlm_count; first += kHeadRows) {
    // The block before has been computed by all: its buffers are free.
    if (first != 0) team.barrier();
    MlmBlock block{};
    block.rows = static_cast<const char*>(mlm_rows) + static_cast<size_t>(first / kHeadRows) * block_bytes;
    block.count = static_cast<int32_t>(std::min<int64_t>(kHeadRows, request.mlm_count - first));
    if (request.mlm_logits != nullptr) block.logits = request.mlm_logits + first * sizes.vocab;
    if (request.top_k > 0) {
      block.top_k = request.top_k;
      block.top_ids = request.top_ids + first * request.top_k;
      block.top_log_probs = request.top_log_probs + first * request.top_k;
    }
    if (request.candidate_count > 0) {
      block.candidate_count = request.candidate_count;
      block.candidates = request.candidates + first * request.candidate_count;
      block.candidate_log_probs = request.candidate_log_probs + first * request.candidate_count;
    }
    table.mlm(model, block, mlm_buffers, scratch[static_cast<size_t>(rank)], team, rank);
  }
}

void Run::compute_pool(Group& team, int rank) noexcept {
  const Architecture& sizes = model.architecture;
  const size_t block_bytes = gathered_bytes(sizes, kHeadRows);
  for (int64_t first = 0; first < batch.sequences; first += kHeadRows) {
    if (first != 0) team.barrier();
    PoolBlock block{};
    block.rows = static_cast<const char*>(pooled_rows) + static_cast<size_t>(first / kHeadRows) * block_bytes;
    block.count = static_cast<int32_t>(std::min<int64_t>(kHeadRows, batch.sequences - first));
    block.pooled = request.pooled != nullptr ? request.pooled + first * sizes.hidden : pooled_scratch;
    if (request.nsp_logits != nullptr) block.nsp = request.nsp_logits + first * 2;
    table.pool(model, block, pool_buffers, scratch[static_cast<size_t>(rank)], team, rank);
  }
}

void Run::work(Group& team, int rank) noexcept {
  const uint32_t state = table.enter();
  // Between two pieces of work a barrier: they use the same memory, and the heads need the rows of all chunks.
  bool begun = false;
  const auto begin = [&] {
    if (begun) team.barrier();
    begun = true;
  };
  if (!plan.solo.empty()) {
    begin();
    compute_solo(rank);
  }
  for (const PlannedChunk& planned : plan.shared) {
    begin();
    table.encode(model, chunk_of(planned), shared_buffers, scratch[static_cast<size_t>(rank)], team, rank);
  }
  if (parts.mlm) {
    begin();
    compute_mlm(team, rank);
  }
  if (parts.pool) {
    begin();
    compute_pool(team, rank);
  }
  table.leave(state);
}

}  // namespace

struct Engine::State {
  std::unique_ptr<Weights> weights;
  const KernelTable* table = nullptr;
  const char* isa = nullptr;
  int threads = 0;
  bool pin = false;
  mutable Memory memory;

  void run(const Batch& given, const Request& wanted) const;
};

// Copies of the arrays of a checked batch and request that the kernels index by: another thread of the caller may write to
// its own in the meantime. What was copied is checked again.
struct Inputs {
  std::vector<int32_t> ids, segments;
  std::vector<int64_t> offsets, positions, candidates;
  Batch batch;
  Request request;

  Inputs(const Batch& given, const Request& wanted) : batch(given), request(wanted) {
    if (given.tokens > 0) {
      batch.ids = copy(given.ids, static_cast<size_t>(given.tokens), ids);
      batch.segments = copy(given.segments, static_cast<size_t>(given.tokens), segments);
    }
    if (given.sequences > 0) batch.offsets = copy(given.offsets, static_cast<size_t>(given.sequences) + 1, offsets);
    if (wanted.mlm_count > 0) {
      const size_t count = static_cast<size_t>(wanted.mlm_count);
      request.mlm_positions = copy(wanted.mlm_positions, count, positions);
      if (wanted.candidate_count > 0) {
        request.candidates =
            copy(wanted.candidates, times(count, static_cast<size_t>(wanted.candidate_count)), candidates);
      }
    }
  }

 private:
  template <class T>
  static const T* copy(const T* from, size_t count, std::vector<T>& to) {
    if (from == nullptr) return nullptr;
    to.assign(from, from + count);
    return to.data();
  }
};

void Engine::State::run(const Batch& given, const Request& wanted) const {
  const Model& model = weights->model();
  check(model.architecture, given, wanted);
  const Inputs inputs(given, wanted);
  const Batch& batch = inputs.batch;
  const Request& request = inputs.request;
  check(model.architecture, batch, request);
  const Parts parts(request);
  if (!parts.states && !parts.mlm && !parts.pool) return;

  std::vector<int64_t> sequence_of_position;
  if (parts.mlm) sequence_of_position = sequences_of_positions(batch, request);
  const std::vector<int64_t> numbers = needed(batch, sequence_of_position, parts);

  Team team(threads, pin);
  Run run{model, *table, batch, request, parts, make_plan(batch.offsets, numbers, team.size())};
  if (parts.mlm) {
    std::vector<int64_t> place(static_cast<size_t>(batch.sequences), 0);
    for (size_t i = 0; i < run.plan.numbers.size(); ++i) {
      place[static_cast<size_t>(run.plan.numbers[i])] = static_cast<int64_t>(i);
    }
    run.mlm_picks = Picks::of_positions(batch, request, run.plan, sequence_of_position, place);
  }
  if (parts.pool) run.pool_picks = Picks::of_first_tokens(run.plan);
  run.next = std::vector<std::atomic<size_t>>(run.plan.solo.size());
  run.scratch.reserve(static_cast<size_t>(team.size()));

  size_t bytes = 0;
  run.lay_out(nullptr, team.size(), &bytes);
  const Memory::Block block(memory, bytes);
  run.lay_out(static_cast<char*>(block.data()), team.size(), &bytes);

  team.run([](void* context, Group& group, int rank) { static_cast<Run*>(context)->work(group, rank); }, &run);
}

Engine::Engine(const std::string& path, const Options& options) : state_(std::make_unique<State>()) {
  if (options.threads < 0 || options.threads > kMostThreads) {
    throw Error(ErrorCode::kInvalidArgument, "threads is " + std::to_string(options.threads) +
                                                 ", but must be from 1 to " + std::to_string(kMostThreads) +
                                                 ", or 0 for as many as the process has processors");
  }
  state_->table = &select_kernels();
  for (int i = 0; i < kIsaCount; ++i) {
    if (kernels_of(static_cast<Isa>(i)) == state_->table) state_->isa = isa_name(static_cast<Isa>(i));
  }
  state_->weights = Weights::open(path.c_str(), options.verify, options.huge);
  state_->threads = options.threads > 0 ? options.threads : usable_processors();
  state_->pin = options.pin;
}

Engine::~Engine() = default;

void Engine::run(const Batch& batch, const Request& request) const {
  try {
    state_->run(batch, request);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, "not enough memory to plan the batch; run smaller batches");
  }
}

const Architecture& Engine::architecture() const { return state_->weights->model().architecture; }
const char* Engine::isa() const { return state_->isa; }
int Engine::threads() const { return state_->threads; }
size_t Engine::weight_bytes() const { return state_->weights->bytes(); }

}  // namespace bertrt
