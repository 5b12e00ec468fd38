// Runs CUDA kernels on the CPU, more strictly than a GPU. The threads of a block are fibers that take turns on one CPU
// thread: each runs until it waits for others. Blocks run one after another. An error of a kernel that can be detected
// here ends the launch with cudaErrorLaunchFailure. cudaGetErrorString says what happened, in which thread and on which
// line.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr size_t kMostShared = 1024 * 1024;  // of any emulated device
constexpr size_t kGuardBytes = 1024 * 1024;  // unreadable memory after shared memory
constexpr size_t kMarginBytes = 4096;        // memory before shared memory, which must not change
constexpr unsigned char kPoison = 0xff;      // four such bytes are a NaN, and so are two in half precision

const char* name_of(Call call) {
  switch (call) {
    case Call::kSyncThreads:
      return "__syncthreads";
    case Call::kSyncWarp:
      return "__syncwarp";
    case Call::kBallot:
      return "__ballot_sync";
    case Call::kShuffle:
      return "__shfl_sync";
    case Call::kShuffleXor:
      return "__shfl_xor_sync";
  }
  return "?";
}

struct Copy {
  void* to;
  const void* from;
  size_t size;
  long batch;
};

enum class State { kReady, kWaitsForBlock, kWaitsForWarp, kWaitsForCopies, kDone };

struct Fiber {
  jmp_buf context;
  bool begun = false;  // whether `context` waits for work on its own stack
  State state = State::kDone;
  int index;
  uint3 thread;
  WarpCall waiting;  // the call in which it waits, also for the block
  uint64_t result;
  std::vector<Copy> copies;
  long batches = 0;  // committed
};

// Memory that ends, up to a multiple of 16 bytes, where nothing may be read.
struct Allocation {
  size_t mapped, bytes;
  unsigned char poison;
};

// Only one CPU thread launches at a time.
std::mutex one_launch;
std::vector<const void*> launches;  // kernels
std::map<const void*, size_t> allowed_shared_bytes;
std::map<char*, Allocation> allocations;
std::string message;  // of the last error

jmp_buf scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
char* stacks = nullptr;
Fiber* running = nullptr;
bool in_thread = false;  // of a block, not in the scheduler
bool failed = false;
int block_threads = 0;
void (*kernel_body)(void*) = nullptr;
void* kernel_state = nullptr;
char* shared_end = nullptr;
char* shared_start = nullptr;
size_t shared_bytes = 0;
uint64_t random_state = 1;

// The signal handler stores this for the message.
struct {
  int signal = 0;
  char* address = nullptr;
  char* instruction = nullptr;
} fault;

uint64_t draw(uint64_t below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % below;
}

// A permutation of 0 ... count - 1: ascending, descending or mixed, in turn.
class Order {
 public:
  Order(uint64_t count, uint64_t turn) : count_(count) {
    if (turn % 3 == 1) first_ = count - 1, stride_ = count - 1;
    if (turn % 3 == 2) {
      first_ = draw(count);
      do stride_ = 1 + draw(count);
      while (std::gcd(stride_, count) != 1);
    }
  }
  uint64_t at(uint64_t index) const { return (first_ + index * stride_) % count_; }

 private:
  uint64_t count_, first_ = 0, stride_ = 1;
};

std::string text(uint3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string text(const Fiber& fiber) { return "thread " + text(fiber.thread); }

std::string text(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

bool same(Place here, Place there) {
  return here.line == there.line && (here.file == there.file || std::strcmp(here.file, there.file) == 0);
}

std::string whereabouts(const Fiber& fiber) {
  if (fiber.state == State::kDone) return text(fiber) + " has ended";
  if (fiber.state == State::kReady) return text(fiber) + " goes on";
  return text(fiber) + " waits in " + name_of(fiber.waiting.call) + " at " + text(fiber.waiting.place);
}

void record_failure(const std::string& what) {
  failed = true;
  message = "block " + text(blockIdx) + ", " + what;
}

// Ends the launch from within a thread. Objects on its stack are abandoned.
[[noreturn]] void fail(const std::string& what) {
  record_failure(text(*running) + ": " + what);
  running->begun = false;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] void back_to_scheduler() {
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    back_to_scheduler();
    kernel_body(kernel_state);
    running->state = State::kDone;
  }
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.thread;
  in_thread = true;
  if (_setjmp(scheduler) == 0) _longjmp(fiber.context, 1);
  in_thread = false;
}

// Puts a fiber on its own stack, where it waits for its first kernel.
[[gnu::noinline]] void begin(Fiber& fiber, char* stack) {
  static ucontext_t context;  // not on this stack: it must outlive the jump
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  running = &fiber;
  fiber.begun = true;
  if (_setjmp(scheduler) == 0) setcontext(&context);
}

char* reserve(size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) std::perror("emulator: mmap"), std::abort();
  return static_cast<char*>(start);
}

void make_unreadable(char* start, size_t bytes) {
  if (mprotect(start, bytes, PROT_NONE) != 0) std::perror("emulator: mprotect"), std::abort();
}

void prepare_memory() {
  if (stacks != nullptr) return;
  const size_t page = sysconf(_SC_PAGESIZE);
  stacks = reserve(kMostThreads * (kStackBytes + page));  // below each stack a page that nobody may touch
  for (int index = 0; index < kMostThreads; ++index) {
    make_unreadable(stacks + index * (kStackBytes + page), page);
    fibers.push_back(std::make_unique<Fiber>());
  }
  char* shared = reserve(kMarginBytes + kMostShared + kGuardBytes);
  shared_end = shared + kMarginBytes + kMostShared;
  make_unreadable(shared_end, kGuardBytes);
}

void prepare_fibers() {
  const size_t page = sysconf(_SC_PAGESIZE);
  for (int index = 0; index < block_threads; ++index) {
    if (!fibers[index]->begun) begin(*fibers[index], stacks + index * (kStackBytes + page) + page);
  }
}

bool is_filled(const char* start, const char* end, unsigned char byte) {
  return std::all_of(start, end, [&](char found) { return static_cast<unsigned char>(found) == byte; });
}

size_t rounded_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

void check_ends_of_allocations() {
  for (const auto& [start, allocation] : allocations) {
    if (!is_filled(start + allocation.bytes, start + rounded_up(allocation.bytes), allocation.poison)) {
      return record_failure("a write past the end of a tensor of " + std::to_string(allocation.bytes) + " bytes");
    }
  }
}

// Fills shared memory and its surroundings with poison. It ends, up to a multiple of 16 bytes, at the guard.
void prepare_shared_memory() {
  shared_start = shared_end - rounded_up(shared_bytes);
  std::memset(shared_start - kMarginBytes, kPoison, shared_end - shared_start + kMarginBytes);
}

// Releases the threads if all that have not ended wait at the block's barrier. Returns whether it did.
bool open_barrier() {
  const Fiber* first = nullptr;
  for (int index = 0; index < block_threads; ++index) {
    const Fiber& fiber = *fibers[index];
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kWaitsForBlock) return false;
    if (first == nullptr) first = &fiber;
    if (!same(fiber.waiting.place, first->waiting.place)) {
      record_failure("threads wait at different barriers: " + whereabouts(*first) + ", " + whereabouts(fiber));
      return false;
    }
  }
  for (int index = 0; index < block_threads; ++index) {
    if (fibers[index]->state == State::kWaitsForBlock) fibers[index]->state = State::kReady;
  }
  return true;
}

void explain_deadlock() {
  const Fiber* first = nullptr;
  for (int index = 0; index < block_threads; ++index) {
    const Fiber& fiber = *fibers[index];
    if (fiber.state != State::kWaitsForWarp) continue;
    for (int lane = 0; lane < warpSize; ++lane) {
      const int other = index / warpSize * warpSize + lane;
      if ((fiber.waiting.mask >> lane & 1) == 0) continue;
      const Fiber& awaited = *fibers[other];
      if (awaited.state == State::kWaitsForWarp && awaited.waiting.mask == fiber.waiting.mask) continue;
      return record_failure(whereabouts(fiber) + " for ever: " + whereabouts(awaited));
    }
    first = &fiber;
  }
  record_failure((first != nullptr ? whereabouts(*first) : std::string("all threads wait")) + " for ever");
}

void explain_fault();

// Runs one warp after another until all its threads wait or have ended. The order changes every time, so that any two
// accesses without a barrier between them happen in both orders. Returns false if all have ended or one has failed.
bool run_warps() {
  static uint64_t turn = 0, lane_turn = 0;
  const int warps = (block_threads + warpSize - 1) / warpSize;
  const Order order(warps, turn++);
  for (int position = 0; position < warps; ++position) {
    const int first = static_cast<int>(order.at(position)) * warpSize;
    const int lanes = std::min(warpSize, block_threads - first);
    for (bool progress = true; progress;) {
      progress = false;
      const Order lane_order(lanes, lane_turn++);
      for (int lane = 0; lane < lanes; ++lane) {
        Fiber& fiber = *fibers[first + lane_order.at(lane)];
        if (fiber.state != State::kReady) continue;
        resume(fiber);
        progress = true;
        if (fault.signal != 0) explain_fault();
        if (failed) return false;
      }
    }
  }
  return std::any_of(fibers.begin(), fibers.begin() + block_threads,
                     [](const auto& fiber) { return fiber->state != State::kDone; });
}

// Releases the threads that wait for copies, once all others wait too. Returns whether there were any.
bool let_copies_arrive() {
  bool any = false;
  for (int index = 0; index < block_threads; ++index) {
    if (fibers[index]->state != State::kWaitsForCopies) continue;
    fibers[index]->state = State::kReady;
    any = true;
  }
  return any;
}

void run_block(uint3 block) {
  blockIdx = block;
  prepare_fibers();
  prepare_shared_memory();
  int index = 0;
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x) {
        Fiber& fiber = *fibers[index];
        fiber.index = index++;
        fiber.thread = {x, y, z};
        fiber.state = State::kReady;
        fiber.copies.clear();
        fiber.batches = 0;
      }
    }
  }
  while (run_warps()) {
    if (!let_copies_arrive() && !open_barrier()) {
      if (!failed) explain_deadlock();
      return;
    }
  }
  if (failed) return;
  if (!is_filled(shared_start - kMarginBytes, shared_start, kPoison)) {
    return record_failure("a write before its shared memory");
  }
  if (!is_filled(shared_start + shared_bytes, shared_end, kPoison)) {
    return record_failure("a write past its " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
}

// ---- Signals: accesses of unmapped memory, and traps of the compiler's checks for undefined behaviour.

constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!in_thread) {  // This is an error of the emulator itself. The instruction runs again and ends the process.
    std::signal(signal, SIG_DFL);
    return;
  }
  const auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  fault.instruction = reinterpret_cast<char*>(machine.gregs[REG_RIP]);
#else
  fault.instruction = reinterpret_cast<char*>(machine.pc);
#endif
  fault.signal = signal;
  fault.address = static_cast<char*>(info->si_addr);
  _longjmp(scheduler, 1);
}

// While it lives, faults of this CPU thread end the kernel and not the process.
class CatchSignals {
 public:
  CatchSignals() {
    static std::array<char, 64 * 1024> stack;  // The stack of a fiber may be full.
    stack_t ours{};
    ours.ss_sp = stack.data();
    ours.ss_size = stack.size();
    sigaltstack(&ours, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t index = 0; index < kSignals.size(); ++index) sigaction(kSignals[index], &action, &previous_[index]);
  }
  ~CatchSignals() {
    for (size_t index = 0; index < kSignals.size(); ++index) sigaction(kSignals[index], &previous_[index], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  stack_t previous_stack_;
  std::array<struct sigaction, kSignals.size()> previous_;
};

// Returns file and line of an instruction in this library if addr2line finds them.
std::string line_of(const char* instruction) {
  Dl_info library;
  if (dladdr(instruction, &library) == 0) return "unknown line";
  char command[4096], line[4096] = "";
  std::snprintf(command, sizeof(command), "addr2line -s -e '%s' 0x%tx 2>/dev/null", library.dli_fname,
                instruction - static_cast<const char*>(library.dli_fbase));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof(line), pipe) == nullptr) line[0] = '\0';
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = '\0';
  return line[0] == '\0' ? "unknown line" : line;
}

void explain_fault() {
  const bool in_memory = fault.signal == SIGSEGV || fault.signal == SIGBUS;
  const ptrdiff_t past = fault.address - (shared_start + shared_bytes);
  std::string what = "undefined behaviour (a misaligned access, an index beyond an array, signed overflow, ...)";
  if (in_memory && fault.address >= shared_end && fault.address < shared_end + kGuardBytes) {
    what = "access " + std::to_string(past) + " bytes past its " + std::to_string(shared_bytes) +
           " bytes of shared memory";
  } else if (in_memory && fault.address >= stacks &&
             fault.address < stacks + kMostThreads * (kStackBytes + sysconf(_SC_PAGESIZE))) {
    what = "more than " + std::to_string(kStackBytes) + " bytes of local variables";
  } else if (in_memory) {
    what = "access of global memory that is not there";
  }
  running->begun = false;
  record_failure(text(*running) + ": " + what + ", near " + line_of(fault.instruction));
  fault.signal = 0;
}

// Bytes of shared memory that a block may ask for: those of an H200, unless a test asks for a smaller device.
size_t most_shared_bytes() {
  const char* asked = std::getenv("SPARSECNX_EMULATOR_SHARED_BYTES");
  return asked == nullptr ? 232448 : std::atoi(asked);
}

cudaError_t refuse(cudaError_t status, const std::string& why) {
  message = why;
  return status;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return refuse(cudaErrorInvalidConfiguration, "a block of " + text(uint3{block.x, block.y, block.z}) + " threads");
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + text(uint3{grid.x, grid.y, grid.z}) + " blocks");
  }
  const auto asked = allowed_shared_bytes.find(kernel);
  const size_t allowed = asked == allowed_shared_bytes.end() ? kSharedWithoutAsking : asked->second;
  if (config.dynamicSmemBytes > std::max(allowed, kSharedWithoutAsking)) {
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of shared memory, without asking for more than " +
                                             std::to_string(allowed));
  }
  return cudaSuccess;
}

}  // namespace

void sync_threads(Place place) {
  running->state = State::kWaitsForBlock;
  running->waiting = {Call::kSyncThreads, 0, 0, 0, 0, place};
  back_to_scheduler();
}

// Returns the lane whose value a lane gets from a shuffle, or the lane itself if there is none.
static int source_lane(const WarpCall& call, int lane) {
  const int first = lane & ~(call.width - 1), last = first + call.width - 1;
  if (call.call == Call::kShuffle) return first + (call.operand & (call.width - 1));
  if (call.call == Call::kShuffleXor && (lane ^ call.operand) <= last) return lane ^ call.operand;
  return lane;
}

// The last lane that arrives does the work for all and goes on. The others get their turn later.
uint64_t meet_in_warp(const WarpCall& call) {
  Fiber& self = *running;
  const int warp = self.index / warpSize * warpSize, lane = self.index % warpSize;
  const auto here = [&] { return name_of(call.call) + (" at " + text(call.place)); };
  if ((call.mask >> lane & 1) == 0) fail("is not in the mask of its own " + here());
  if (call.width < 1 || call.width > warpSize || (call.width & (call.width - 1)) != 0) {
    fail("width " + std::to_string(call.width) + " in " + here());
  }
  self.waiting = call;
  self.state = State::kWaitsForWarp;
  uint64_t ballot = 0;
  for (int other = 0; other < warpSize; ++other) {
    if ((call.mask >> other & 1) == 0) continue;
    if (warp + other >= block_threads) fail("the mask of " + here() + " names lanes that the block does not have");
    const Fiber& fiber = *fibers[warp + other];
    if (fiber.state == State::kDone) fail("the mask of " + here() + " names " + text(fiber) + ", which has ended");
    const bool arrived = fiber.state == State::kWaitsForWarp && fiber.waiting.mask == call.mask &&
                         fiber.waiting.call == call.call && same(fiber.waiting.place, call.place);
    if (fiber.state == State::kWaitsForWarp && !arrived && (fiber.waiting.mask >> lane & 1) != 0) {
      fail("waits in " + here() + " while " + whereabouts(fiber));
    }
    if (!arrived) {
      back_to_scheduler();
      return self.result;
    }
    ballot |= fiber.waiting.value << other;
  }
  for (int other = 0; other < warpSize; ++other) {
    if ((call.mask >> other & 1) == 0) continue;
    Fiber& fiber = *fibers[warp + other];
    const int from = source_lane(fiber.waiting, other);
    if ((call.mask >> from & 1) == 0) fail(here() + " reads from lane " + std::to_string(from) + ", not in its mask");
    fiber.result = call.call == Call::kBallot ? ballot : fibers[warp + from]->waiting.value;
    fiber.state = State::kReady;
  }
  return self.result;
}

void copy_async(void* to, const void* from, size_t size) {
  if (size != 4 && size != 8 && size != 16) fail("__pipeline_memcpy_async of " + std::to_string(size) + " bytes");
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0) {
    fail("__pipeline_memcpy_async of " + std::to_string(size) + " bytes at no multiple of that");
  }
  const char* start = static_cast<char*>(to);
  if (start < shared_start || start + size > shared_start + shared_bytes) {
    fail("__pipeline_memcpy_async to outside its shared memory");
  }
  std::memset(to, kPoison, size);
  running->copies.push_back({to, from, size, running->batches});
}

void commit_copies() { ++running->batches; }

// All other threads run as far as they can before the copies arrive, so that threads which still read the old values
// see poison.
void wait_for_copies(size_t batches_left) {
  auto& copies = running->copies;
  const long done = running->batches - static_cast<long>(batches_left);
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) { return copy.batch >= done; });
  if (end == copies.begin()) return;
  running->state = State::kWaitsForCopies;
  back_to_scheduler();
  for (auto copy = copies.begin(); copy != end; ++copy) std::memcpy(copy->to, copy->from, copy->size);
  copies.erase(copies.begin(), end);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* state) {
  static uint64_t turn = 0;
  const std::scoped_lock lock(one_launch);
  if (const cudaError_t status = check(config, kernel); status != cudaSuccess) return status;
  launches.push_back(kernel);
  prepare_memory();
  const CatchSignals catching;
  failed = false;
  kernel_body = body;
  kernel_state = state;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block_threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  shared_bytes = config.dynamicSmemBytes;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  const Order order(blocks, turn++);
  for (uint64_t index = 0; index < blocks && !failed; ++index) {
    const uint64_t block = order.at(index);
    run_block({static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
               static_cast<unsigned>(block / gridDim.x / gridDim.y)});
  }
  if (!failed) check_ends_of_allocations();
  if (!failed) return cudaSuccess;
  for (int index = 0; index < block_threads; ++index) {
    if (fibers[index]->state != State::kDone) fibers[index]->begun = false;  // its stack is in the midst of the kernel
  }
  return cudaErrorLaunchFailure;
}

}  // namespace emulator

uint4 (*sparsecnx::cuda::emulator_shared_memory()) [] { return reinterpret_cast<uint4(*)[]>(emulator::shared_start); }

// ---- The runtime.

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulator::message.c_str();
}

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "?";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool processors = attribute == cudaDevAttrMultiProcessorCount;
  *value = processors ? 132 : static_cast<int>(emulator::most_shared_bytes());
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  const std::scoped_lock lock(emulator::one_launch);
  if (value < 0 || static_cast<size_t>(value) > emulator::most_shared_bytes()) {
    return emulator::refuse(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory, the device has " +
                                                       std::to_string(emulator::most_shared_bytes()));
  }
  emulator::allowed_shared_bytes[function] = value;
  return cudaSuccess;
}

// ---- For tests, through ctypes.

extern "C" {

// Returns memory filled with one byte, at a multiple of 16 bytes. A kernel that reads or writes past its end fails.
// Within the 16 bytes to which the size is rounded up, only writing is an error.
[[gnu::visibility("default")]] void* emulator_allocate(size_t bytes, unsigned char poison) {
  const std::scoped_lock lock(emulator::one_launch);
  const size_t page = sysconf(_SC_PAGESIZE), kept = emulator::rounded_up(bytes);
  const size_t mapped = (kept + page - 1) / page * page + page;
  char* end = emulator::reserve(mapped) + mapped - page;
  emulator::make_unreadable(end, page);
  std::memset(end - kept, poison, kept);
  if (kept > 0) emulator::allocations[end - kept] = {mapped, bytes, poison};
  return end - kept;
}

[[gnu::visibility("default")]] void emulator_release(void* start) {
  const std::scoped_lock lock(emulator::one_launch);
  const auto found = emulator::allocations.find(static_cast<char*>(start));
  if (found == emulator::allocations.end()) return;
  const size_t page = sysconf(_SC_PAGESIZE);
  munmap(found->first + emulator::rounded_up(found->second.bytes) + page - found->second.mapped, found->second.mapped);
  emulator::allocations.erase(found);
}

[[gnu::visibility("default")]] size_t emulator_launches() { return emulator::launches.size(); }

[[gnu::visibility("default")]] void emulator_forget_launches() { emulator::launches.clear(); }

// Returns the address in this library of the kernel of a launch.
[[gnu::visibility("default")]] size_t emulator_launch(size_t index) {
  const void* kernel = emulator::launches.at(index);
  Dl_info library;
  if (dladdr(kernel, &library) == 0) return 0;
  return static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
}

// Changes the order of threads and blocks.
[[gnu::visibility("default")]] void emulator_seed(uint64_t seed) {
  emulator::random_state = seed * 0x9e3779b97f4a7c15 | 1;
}
}
