// Errors inside the library. They never cross the C interface or the Python binding as they are.
#pragma once

#include <stdexcept>
#include <string>

namespace bertrt {

enum class ErrorCode {
  kInvalidArgument = 1,  // an argument or an input array that cannot be answered as it was given
  kNotFound = 2,         // no such file or folder
  kBadFile = 3,          // a weight file that is corrupt, truncated, foreign or of another version
  kMissingHead = 4,      // the checkpoint never had the head that was asked for
  kUnsupported = 5,      // what this processor or this build lacks
  kOutOfMemory = 6,      // memory could not be had
  kSystem = 7,           // the operating system refused something else
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace bertrt
