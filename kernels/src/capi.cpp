// The C interface: structs in and out, errors as codes and messages. Nothing is thrown across it.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <system_error>

#include "../include/bertrt.h"
#include "engine.h"
#include "error.h"
#include "names.h"

struct bertrt_engine {
  bertrt_engine(const std::string& path, const bertrt::Options& options) : engine(path, options) {}
  bertrt::Engine engine;
};

namespace {

using bertrt::Error;
using bertrt::ErrorCode;

constexpr const char* kWeights = "model.bertrt";

// Copies what fits, and no half of a UTF-8 character.
template <size_t N>
void copy_text(char (&to)[N], std::string_view text) {
  size_t length = std::min(text.size(), N - 1);
  while (length > 0 && length < text.size() && (static_cast<unsigned char>(text[length]) & 0xc0) == 0x80) --length;
  std::memcpy(to, text.data(), length);
  std::memset(to + length, 0, N - length);
}

// Allocates nothing: it may be called because there is no memory.
bertrt_status report(bertrt_error* error, bertrt_status status, std::string_view message) noexcept {
  if (error != nullptr) {
    error->status = status;
    copy_text(error->message, message);
  }
  return status;
}

// Calls `body` and turns what it throws into a status.
template <class Body>
bertrt_status guarded(bertrt_error* error, Body body) noexcept {
  try {
    body();
    return report(error, BERTRT_OK, "");
  } catch (const Error& thrown) {
    return report(error, static_cast<bertrt_status>(thrown.code()), thrown.what());
  } catch (const std::bad_alloc&) {
    return report(error, BERTRT_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& thrown) {
    return report(error, BERTRT_SYSTEM, thrown.what());
  }
}

void check_not_null(const char* name, const void* pointer) {
  if (pointer == nullptr) throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is null");
}

// A struct of the caller in the form that this library knows. What the caller's header lacks is zero; what only the
// caller's header has must be zero, since this library cannot do it.
template <class T>
T adopt(const char* name, const T* given, size_t smallest) {
  check_not_null(name, given);
  const size_t size = given->struct_size;
  if (size < smallest || size > 4096) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + ".struct_size is " + std::to_string(size) +
                                                 ", but must be sizeof the struct: begin with its INIT macro");
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      throw Error(ErrorCode::kUnsupported, std::string(name) + " asks for what a later release than " + BERTRT_VERSION +
                                               " can do; use that release's library");
    }
  }
  T known{};
  std::memcpy(&known, given, std::min(size, sizeof(T)));
  return known;
}

// The size of a struct up to and with its last member of the first release.
#define BERTRT_SIZE_WITH(type, member) (offsetof(type, member) + sizeof(type::member))

std::string find_weights(const char* folder) {
  namespace fs = std::filesystem;
  std::error_code failure;
  const fs::path path(folder);
  const fs::file_status status = fs::status(path, failure);
  if (status.type() == fs::file_type::not_found) {
    throw Error(ErrorCode::kNotFound, "there is no engine folder '" + path.string() + "'");
  }
  if (failure) throw Error(ErrorCode::kSystem, "cannot look into '" + path.string() + "': " + failure.message());
  if (!fs::is_directory(status)) {
    throw Error(ErrorCode::kInvalidArgument,
                "'" + path.string() + "' is not an engine folder but a file; give the folder");
  }
  const fs::path weights = path / kWeights;
  const bool found = fs::exists(weights, failure);
  if (failure) throw Error(ErrorCode::kSystem, "cannot look into '" + path.string() + "': " + failure.message());
  if (!found) {
    const bool engine = fs::exists(path / "engine.json", failure);
    throw Error(ErrorCode::kNotFound,
                engine ? "the engine in '" + path.string() + "' has no weights for the native backend (" + kWeights +
                             "); export it again with --backend native"
                       : "'" + path.string() + "' is not an engine folder: it holds neither engine.json nor " +
                             kWeights + "; make one with bertrt export");
  }
  return weights.string();
}

}  // namespace

extern "C" {

const char* bertrt_version(void) { return BERTRT_VERSION; }

bertrt_status bertrt_open(const char* folder, const bertrt_options* options, bertrt_engine** engine,
                          bertrt_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return guarded(error, [&] {
    check_not_null("engine", engine);
    check_not_null("folder", folder);
    bertrt::Options known;
    if (options != nullptr) {
      const bertrt_options given = adopt("options", options, BERTRT_SIZE_WITH(bertrt_options, verify));
      known.threads = given.threads;
      known.pin = given.pin != 0;
      known.verify = given.verify != 0;
      known.huge = given.huge_pages != 0;
    }
    *engine = std::make_unique<bertrt_engine>(find_weights(folder), known).release();
  });
}

void bertrt_close(bertrt_engine* engine) { delete engine; }

bertrt_status bertrt_run(const bertrt_engine* engine, const bertrt_batch* batch, const bertrt_request* request,
                         bertrt_error* error) {
  return guarded(error, [&] {
    check_not_null("engine", engine);
    const bertrt_batch b = adopt("batch", batch, BERTRT_SIZE_WITH(bertrt_batch, sequences));
    const bertrt_request r = adopt("request", request, BERTRT_SIZE_WITH(bertrt_request, layers));
    const bertrt::Batch known_batch = {b.input_ids, b.token_type_ids, b.tokens, b.offsets, b.sequences};
    bertrt::Request known;
    known.mlm_positions = r.mlm_positions;
    known.mlm_count = r.mlm_count;
    known.mlm_logits = r.mlm_logits;
    known.top_k = r.top_k;
    known.top_ids = r.top_ids;
    known.top_log_probs = r.top_log_probs;
    known.candidates = r.candidates;
    known.candidate_count = r.candidate_count;
    known.candidate_log_probs = r.candidate_log_probs;
    known.hidden_states = r.hidden_states;
    known.pooled = r.pooled;
    known.nsp_logits = r.nsp_logits;
    known.layers = r.layers;
    engine->engine.run(known_batch, known);
  });
}

bertrt_status bertrt_get_architecture(const bertrt_engine* engine, bertrt_architecture* architecture,
                                      bertrt_error* error) {
  return guarded(error, [&] {
    check_not_null("engine", engine);
    check_not_null("architecture", architecture);
    const size_t size = architecture->struct_size;
    if (size < BERTRT_SIZE_WITH(bertrt_architecture, precision)) {
      throw Error(ErrorCode::kInvalidArgument, "architecture.struct_size is " + std::to_string(size) +
                                                   ", but must be sizeof the struct: begin with its INIT macro");
    }
    const bertrt::Architecture& from = engine->engine.architecture();
    bertrt_architecture to{};
    to.struct_size = size;
    to.hidden_size = from.hidden;
    to.num_hidden_layers = from.layers;
    to.num_attention_heads = from.heads;
    to.intermediate_size = from.intermediate;
    to.vocab_size = from.vocab;
    to.max_position_embeddings = from.positions;
    to.type_vocab_size = from.segments;
    to.layer_norm_eps = from.norm_epsilon;
    to.has_mlm = from.has_mlm;
    to.has_nsp = from.has_nsp;
    to.has_pooler = from.has_pooler;
    copy_text(to.hidden_act, bertrt::activation_name(from.activation));
    copy_text(to.precision, bertrt::precision_name(from.precision));
    std::memcpy(architecture, &to, std::min(size, sizeof(to)));
  });
}

const char* bertrt_isa(const bertrt_engine* engine) { return engine == nullptr ? "" : engine->engine.isa(); }

int32_t bertrt_threads(const bertrt_engine* engine) { return engine == nullptr ? 0 : engine->engine.threads(); }

}  // extern "C"
