#include "cpus.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

#include "pool.h"

namespace bertrt {
namespace {

using Parts = std::vector<std::string>;  // of a path

// More than any of the files read here holds on the largest machines; a bound all the same.
constexpr size_t kLargestFile = 16 << 20;

// A hierarchy of control groups that is mounted: the group at its top, and where.
struct Mount {
  int version;
  Parts group;
  std::string point;
};

// The text of a file of the system; empty if it is not there or may not be read.
std::string read_text(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rbe");
  if (file == nullptr) return {};
  std::string text;
  char buffer[4096];
  size_t count;
  while (text.size() < kLargestFile && (count = std::fread(buffer, 1, sizeof buffer, file)) > 0) {
    text.append(buffer, count);
  }
  std::fclose(file);
  return text;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> pieces;
  for (size_t end; (end = text.find(separator)) != std::string_view::npos; text.remove_prefix(end + 1)) {
    pieces.emplace_back(text.substr(0, end));
  }
  pieces.emplace_back(text);
  return pieces;
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> found;
  for (size_t begin = 0; (begin = text.find_first_not_of(" \t\n", begin)) != std::string::npos;) {
    const size_t end = std::min(text.find_first_of(" \t\n", begin), text.size());
    found.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return found;
}

Parts path_parts(std::string_view path) {
  Parts parts = split(path, '/');
  std::erase_if(parts, [](const std::string& part) { return part.empty() || part == "."; });
  return parts;
}

// Undoes the octal escapes (of space, tab, newline and backslash) in a field of mountinfo.
std::string unescape(const std::string& text) {
  const auto octal = [&](size_t i) { return text[i] >= '0' && text[i] <= '7'; };
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size() && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      plain += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

bool lists(const std::string& comma_separated, std::string_view name) {
  const std::vector<std::string> names = split(comma_separated, ',');
  return std::find(names.begin(), names.end(), name) != names.end();
}

// Mounted hierarchies that can bound processor time. A line of /proc/self/mountinfo (proc_pid_mountinfo(5)) is
// `36 35 98:0 ROOT MOUNT_POINT OPTIONS [TAGS] - TYPE SOURCE SUPER_OPTIONS`.
std::vector<Mount> mounts(const std::string& root) {
  std::vector<Mount> found;
  for (const std::string& line : split(read_text(root + "/proc/self/mountinfo"), '\n')) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    const auto left = split(std::string_view(line).substr(0, dash), ' ');
    const auto right = split(std::string_view(line).substr(dash + 3), ' ');
    if (left.size() < 5 || right.size() < 3) continue;
    const bool second = right[0] == "cgroup2";
    if (second || (right[0] == "cgroup" && lists(right[2], "cpu"))) {
      found.push_back({second ? 2 : 1, path_parts(unescape(left[3])), root + "/" + unescape(left[4])});
    }
  }
  return found;
}

// The process's group in a hierarchy: /proc/self/cgroup has `ID:CONTROLLERS:PATH` a line.
std::optional<Parts> own_group(const std::string& root, int version) {
  for (const std::string& line : split(read_text(root + "/proc/self/cgroup"), '\n')) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version == 2 ? line.compare(0, first, "0") == 0 && controllers.empty() : lists(controllers, "cpu")) {
      return path_parts(std::string_view(line).substr(second + 1));
    }
  }
  return std::nullopt;
}

std::optional<uint64_t> number(const std::string& text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// The quota of one group, not of its ancestors. Version 2 writes "max 100000" or "150000 100000": microseconds of
// processor time in each period.
std::optional<double> group_quota(int version, const std::string& folder) {
  const auto text = words(version == 2 ? read_text(folder + "/cpu.max")
                                       : read_text(folder + "/cpu.cfs_quota_us") + " " +
                                             read_text(folder + "/cpu.cfs_period_us"));
  if (text.size() != 2) return std::nullopt;
  const auto quota = number(text[0]), period = number(text[1]);
  if (!quota || !period || *quota == 0 || *period == 0) return std::nullopt;
  return static_cast<double>(*quota) / static_cast<double>(*period);
}

std::string join(const Parts& parts, size_t count) {
  std::string path;
  for (size_t i = 0; i < count; ++i) path += "/" + parts[i];
  return path;
}

}  // namespace

std::optional<double> processor_quota(const std::string& root) {
  std::optional<double> least;
  for (const Mount& mount : mounts(root)) {
    std::optional<Parts> inside = own_group(root, mount.version);
    if (!inside) continue;
    // In a container the mount shows the hierarchy from some group down, and the path may be the host's.
    const Parts& top = mount.group;
    if (inside->size() >= top.size() && std::equal(top.begin(), top.end(), inside->begin())) {
      inside->erase(inside->begin(), inside->begin() + static_cast<std::ptrdiff_t>(top.size()));
    }
    std::error_code ignored;
    if (std::find(inside->begin(), inside->end(), "..") != inside->end() ||
        !std::filesystem::is_directory(mount.point + join(*inside, inside->size()), ignored)) {
      inside->clear();
    }
    for (size_t depth = 0; depth <= inside->size(); ++depth) {
      const auto quota = group_quota(mount.version, mount.point + join(*inside, depth));
      if (quota && (!least || *quota < *least)) least = quota;
    }
  }
  return least;
}

int cut_by_quota(int processors, std::optional<double> quota) {
  // Compared as floating point first: a quota may be larger than any int.
  if (!quota || *quota >= processors) return processors;
  return std::max(1, static_cast<int>(std::ceil(*quota)));
}

int usable_processors() { return cut_by_quota(static_cast<int>(process_affinity().size()), processor_quota()); }

#ifdef __linux__

namespace {

// A mask of processors. The kernel refuses one shorter than its own, and none has had more than 8,192 so far. It is
// no larger than a worker's stack can spare: workers leave the heap alone.
struct Mask {
  static constexpr int kBits = 1 << 14;
  cpu_set_t words[kBits / CPU_SETSIZE] = {};
};

}  // namespace

std::vector<int> process_affinity() {
  Mask mask;
  // The first thread's id is the process's. It may have ended before the others: then the caller's.
  if (sched_getaffinity(getpid(), sizeof mask, mask.words) != 0) sched_getaffinity(0, sizeof mask, mask.words);
  std::vector<int> processors;
  for (int i = 0; i < Mask::kBits; ++i) {
    if (CPU_ISSET_S(i, sizeof mask, mask.words)) processors.push_back(i);
  }
  if (processors.empty()) processors.push_back(0);
  return processors;
}

bool bind_this_thread(const int* processors, size_t count) noexcept {
  Mask mask;
  for (size_t i = 0; i < count; ++i) CPU_SET_S(processors[i], sizeof mask, mask.words);
  return sched_setaffinity(0, sizeof mask, mask.words) == 0;
}

int current_processor() noexcept { return sched_getcpu(); }

#else

std::vector<int> process_affinity() {
  std::vector<int> processors(std::max(1u, std::thread::hardware_concurrency()));
  for (size_t i = 0; i < processors.size(); ++i) processors[i] = static_cast<int>(i);
  return processors;
}

bool bind_this_thread(const int*, size_t) noexcept { return false; }

int current_processor() noexcept { return -1; }

#endif

}  // namespace bertrt
