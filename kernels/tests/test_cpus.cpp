// Quotas of control groups, on file trees made for the purpose.
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "../src/cpus.h"
#include "../src/pool.h"
#include "check.h"

namespace {

namespace fs = std::filesystem;
using Files = std::map<std::string, std::string>;

const std::string kSecond = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
const std::string kFirst =
    "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n";

// The quota that the files say, -1 for none.
double quota_of(const Files& files) {
  char pattern[] = "/tmp/bertrt-cpus-XXXXXX";
  CHECK(mkdtemp(pattern) != nullptr, "no temporary folder");
  const fs::path root = pattern;
  for (const auto& [name, text] : files) {
    fs::create_directories((root / name).parent_path());
    std::ofstream(root / name) << text;
  }
  const double quota = bertrt::processor_quota(root.string()).value_or(-1);
  fs::remove_all(root);
  return quota;
}

void check_quota(const char* what, const Files& files, double expected) {
  const double quota = quota_of(files);
  CHECK(quota == expected, "%s: %g processors, expected %g", what, quota, expected);
}

Files second(const std::string& group, Files files) {
  files["proc/self/mountinfo"] = kSecond;
  files["proc/self/cgroup"] = "0::" + group + "\n";
  return files;
}

void version_2() {
  check_quota("no files", {}, -1);
  const std::pair<const char*, double> cases[] = {
      {"50000 100000\n", 0.5}, {"150000 100000\n", 1.5}, {"max 100000\n", -1}, {"", -1},       {"nonsense\n", -1},
      {"0 100000\n", -1},      {"100000 0\n", -1},       {"150000\n", -1},     {"-1 1\n", -1}, {"15e4 1\n", -1}};
  for (const auto& [text, expected] : cases) {
    check_quota(text, second("/", {{"sys/fs/cgroup/cpu.max", text}}), expected);
  }
}

void every_ancestor_limits_and_nobody_else() {
  for (const std::string tightest : {"a", "a/b", "a/b/c"}) {
    Files files;
    for (const std::string group : {"a", "a/b", "a/b/c"}) {
      files["sys/fs/cgroup/" + group + "/cpu.max"] = "400000 100000";
    }
    files["sys/fs/cgroup/" + tightest + "/cpu.max"] = "150000 100000\n";
    files["sys/fs/cgroup/other/cpu.max"] = "1000 100000\n";
    check_quota(tightest.c_str(), second("/a/b/c", files), 1.5);
  }
}

void version_1() {
  const std::string cpu = "sys/fs/cgroup/cpu,cpuacct/";
  check_quota("inner group without a limit",
              {{"proc/self/mountinfo", kFirst},
               {"proc/self/cgroup", "9:cpuset:/\n4:cpu,cpuacct:/jobs/one\n"},
               {cpu + "cpu.cfs_quota_us", "-1\n"},
               {cpu + "cpu.cfs_period_us", "100000\n"},
               {cpu + "jobs/cpu.cfs_quota_us", "250000\n"},
               {cpu + "jobs/cpu.cfs_period_us", "100000\n"},
               {cpu + "jobs/one/cpu.cfs_quota_us", "-1\n"},
               {cpu + "jobs/one/cpu.cfs_period_us", "100000\n"}},
              2.5);
}

void containers() {
  // The path in /proc/self/cgroup is the host's, the mount shows the group itself.
  for (const std::string group : {"/docker/1234", "/../../outside", "/nowhere"}) {
    check_quota(group.c_str(),
                second(group, {{"sys/fs/cgroup/cpu.max", "300000 100000\n"},
                               {"sys/fs/cgroup/worker/cpu.max", "max 100000\n"},
                               {"sys/fs/outside/cpu.max", "100000 100000\n"}}),
                3);
  }
  // The mount begins at a group; the process is in one below.
  check_quota("mounted from a group down",
              {{"proc/self/mountinfo", "30 23 0:26 /pods/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"},
               {"proc/self/cgroup", "0::/pods/x/inner\n"},
               {"sys/fs/cgroup/cpu.max", "400000 100000\n"},
               {"sys/fs/cgroup/inner/cpu.max", "200000 100000\n"}},
              2);
}

void hybrid_hierarchies_and_escaped_names() {
  Files files = {{"proc/self/mountinfo", kFirst + "41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw\n"},
                 {"proc/self/cgroup", "4:cpu,cpuacct:/\n0::/x:y\n"},
                 {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "500000\n"},
                 {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"},
                 {"sys/fs/cgroup/uni fied/x:y/cpu.max", "400000 100000\n"}};
  check_quota("version 2 is tighter", files, 4);
  files["sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"] = "350000\n";
  check_quota("version 1 is tighter", files, 3.5);
}

void foreign_text() {
  for (const char* text : {"", "\n", "garbage", "1 2 3 - cgroup2\n", "a b c d e f - cgroup2 x y\n", "- - - - - -\n"}) {
    check_quota(text, {{"proc/self/mountinfo", text}, {"proc/self/cgroup", "0::\n"}}, -1);
    check_quota(text, {{"proc/self/mountinfo", kSecond}, {"proc/self/cgroup", text}}, -1);
  }
}

void cutting() {
  const std::pair<double, int> cases[] = {{0.001, 1}, {1, 1}, {1.00001, 2}, {1.5, 2},
                                          {3, 3},     {8, 8}, {99, 8},      {1e15, 8}};
  for (const auto& [quota, expected] : cases) {
    const int got = bertrt::cut_by_quota(8, quota);
    CHECK(got == expected, "8 processors cut by %g: %d, expected %d", quota, got, expected);
  }
  CHECK(bertrt::cut_by_quota(8, std::nullopt) == 8, "no quota");
}

void of_this_process() {
  const auto processors = bertrt::process_affinity();
  CHECK(!processors.empty(), "at least one");
  for (size_t i = 1; i < processors.size(); ++i) CHECK(processors[i - 1] < processors[i], "rising");
  const int usable = bertrt::usable_processors();
  CHECK(usable >= 1 && usable <= static_cast<int>(processors.size()), "%d usable", usable);
}

}  // namespace

int main(int argc, char** argv) {
  const Test tests[] = {
      {"version_2", version_2},
      {"every_ancestor_limits_and_nobody_else", every_ancestor_limits_and_nobody_else},
      {"version_1", version_1},
      {"containers", containers},
      {"hybrid_hierarchies_and_escaped_names", hybrid_hierarchies_and_escaped_names},
      {"foreign_text", foreign_text},
      {"cutting", cutting},
      {"of_this_process", of_this_process},
  };
  return run_tests(tests, argc, argv);
}
