// Members of many samples: found in the mapped indices of their tars, read, and their crc32c verified.
//
// Two calls for a batch, so that the caller owns all memory: `plan_members` says where in one buffer
// each member and key will lie and which byte ranges of which files are to be read for that;
// `read_members` reads them, many samples at once where they lie close together in a file.
//
// Neither indices nor files are trusted: a row outside its index, ranges that are none, keys beyond
// their text, files that are shorter or other than expected spoil single samples, which are marked.
// What the plan says is read back only from arrays of the caller, never from a mapped file, which
// may change between the calls.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>
#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace {

constexpr int64_t kMostBytesAtOnce = 1 << 30;  // below what one call of any system reads
constexpr int64_t kRunBytes = 256 * 1024;      // of samples read together: these stay in the cache
constexpr int64_t kMaxSample = int64_t{1} << 31;  // larger ones are read by themselves, by Python
constexpr int64_t kMaxBuffer = int64_t{1} << 46;
constexpr int64_t kAlignment = 64;

// What stands beside a sample: a status and a detail.
enum Status : int32_t {
  kGood = 0,
  kNotRead = 1,
  kBadIndex = 2,   // the index has no such row, or no ranges in it, or those of a huge sample
  kShort = 3,      // the file ends before the sample
  kFailed = 4,     // detail: errno
  kDamaged = 5,    // detail: the first field whose checksum fails
};

// ---- crc32c ----

constexpr uint32_t kPolynomial = 0x82F63B78;  // reflected (RFC 3720, section 12.1)
constexpr size_t kStripe = 256;               // bytes of each of three streams, a multiple of 8

struct Tables {
  uint32_t bytes[8][256];    // of a byte, followed by 0..7 zero bytes
  uint32_t stripes[4][256];  // of byte i of a checksum, followed by kStripe zero bytes

  Tables() {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; bit++) c = c & 1 ? c >> 1 ^ kPolynomial : c >> 1;
      bytes[0][i] = c;
    }
    for (int k = 1; k < 8; k++) {
      for (uint32_t i = 0; i < 256; i++) {
        bytes[k][i] = bytes[k - 1][i] >> 8 ^ bytes[0][bytes[k - 1][i] & 255];
      }
    }
    for (int k = 0; k < 4; k++) {
      for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i << 8 * k;
        for (size_t n = 0; n < kStripe; n++) c = c >> 8 ^ bytes[0][c & 255];
        stripes[k][i] = c;
      }
    }
  }
  uint32_t behind_stripe(uint32_t c) const {
    return stripes[0][c & 255] ^ stripes[1][c >> 8 & 255] ^ stripes[2][c >> 16 & 255] ^
           stripes[3][c >> 24];
  }
};
const Tables kTables;

inline uint64_t load(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return word;
}

uint32_t crc_by_tables(uint32_t c, const uint8_t* data, size_t size) {
  const auto& t = kTables.bytes;
  for (; size >= 8; data += 8, size -= 8) {
    const uint64_t x = load(data) ^ c;
    c = t[7][x & 255] ^ t[6][x >> 8 & 255] ^ t[5][x >> 16 & 255] ^ t[4][x >> 24 & 255] ^
        t[3][x >> 32 & 255] ^ t[2][x >> 40 & 255] ^ t[1][x >> 48 & 255] ^ t[0][x >> 56];
  }
  for (; size; data++, size--) c = c >> 8 ^ t[0][(c ^ *data) & 255];
  return c;
}

#if defined(__x86_64__)
#define HAS_CRC 1
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC_WORD(c, word) static_cast<uint32_t>(_mm_crc32_u64(c, word))
#define CRC_BYTE(c, byte) _mm_crc32_u8(c, byte)
bool has_crc() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && (defined(__ARM_FEATURE_CRC32) || defined(__linux__))
#define HAS_CRC 1
#if defined(__ARM_FEATURE_CRC32)
#define CRC_TARGET
bool has_crc() { return true; }
#else
#if defined(__clang__)
#define CRC_TARGET __attribute__((target("crc")))
#else
#define CRC_TARGET __attribute__((target("+crc")))
#endif
bool has_crc() { return getauxval(AT_HWCAP) & (1 << 7); }  // HWCAP_CRC32
#endif
#define CRC_WORD(c, word) __builtin_aarch64_crc32cx(c, word)
#define CRC_BYTE(c, byte) __builtin_aarch64_crc32cb(c, byte)
#if defined(__clang__)
#undef CRC_WORD
#undef CRC_BYTE
#define CRC_WORD(c, word) __builtin_arm_crc32cd(c, word)
#define CRC_BYTE(c, byte) __builtin_arm_crc32cb(c, byte)
#endif
#endif

#ifdef HAS_CRC
// The instruction gives a result after three cycles, but one can begin in each: so three streams.
CRC_TARGET uint32_t crc_by_instructions(uint32_t c, const uint8_t* data, size_t size) {
  for (; size >= 3 * kStripe; data += 3 * kStripe, size -= 3 * kStripe) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < kStripe; i += 8) {
      c = CRC_WORD(c, load(data + i));
      second = CRC_WORD(second, load(data + kStripe + i));
      third = CRC_WORD(third, load(data + 2 * kStripe + i));
    }
    c = kTables.behind_stripe(kTables.behind_stripe(c) ^ second) ^ third;
  }
  for (; size >= 8; data += 8, size -= 8) c = CRC_WORD(c, load(data));
  for (; size; data++, size--) c = CRC_BYTE(c, *data);
  return c;
}
#endif

using Crc = uint32_t (*)(uint32_t, const uint8_t*, size_t);

Crc crc_for_this_processor() {
#ifdef HAS_CRC
  if (has_crc()) return crc_by_instructions;
#endif
  return crc_by_tables;
}
const Crc kCrc = crc_for_this_processor();

uint32_t crc32c(const uint8_t* data, int64_t size) {
  return ~kCrc(~uint32_t{0}, data, static_cast<size_t>(size));
}

// ---- the index of a tar, as the caller has mapped it ----

struct Shard {
  int64_t rows, fields;
  const int64_t *offsets, *sizes;  // (rows, fields); size -1: missing
  const uint32_t* checksums;       // (rows, fields)
  const int64_t* key_ends;         // (rows)
  const uint8_t* keys;
  int64_t key_bytes;
};

template <typename T>
const T* pointer(int64_t address) {
  return reinterpret_cast<const T*>(static_cast<uintptr_t>(address));
}

constexpr int kShardNumbers = 8;

Shard shard_at(const int64_t* shards, int64_t i) {
  const int64_t* s = shards + kShardNumbers * i;
  return {s[0],
          s[1],
          pointer<int64_t>(s[2]),
          pointer<int64_t>(s[3]),
          pointer<uint32_t>(s[4]),
          pointer<int64_t>(s[5]),
          pointer<uint8_t>(s[6]),
          s[7]};
}

constexpr int kRunNumbers = 6;  // shard, begin and end in its file, place in the buffer, samples of
                                // the order: first, last (outside)
struct Span {
  int64_t shard, begin, end, sample;
};

}  // namespace

extern "C" {

// Checksum of some bytes, for tests. by_tables: without the processor's instructions.
uint32_t checksum_of(const uint8_t* data, int64_t size, int32_t by_tables) {
  return by_tables ? ~crc_by_tables(~uint32_t{0}, data, static_cast<size_t>(size))
                   : crc32c(data, size);
}

// Where the members of samples lie and how to read them; nothing is read but indices.
//
// shards (num_shards, 8): rows, fields and key bytes (last) of an index, and the addresses of its
//   offsets, sizes, checksums, ends of keys and keys. columns (num_shards, num_fields): in which
//   column of the index a field is, -1: in none.
// numbers, rows (n): shard and row of each sample.
// gap: bytes that are rather read than skipped.
// -> places, sizes (n, num_fields + 1): of each member in the buffer, last the key; size -1: the
//    sample lacks the field. members_crc (n, num_fields). status (n, 2).
//    order (n): the samples in the order of the runs. runs (n, 6), *num_runs of them.
// Returns the bytes that the buffer needs; -1: memory is short; -2: more than any buffer has.
int64_t plan_members(const int64_t* shards, int64_t num_shards, const int32_t* columns,
                     int64_t num_fields, const int64_t* numbers, const int64_t* rows, int64_t n,
                     int64_t gap, int64_t* places, int64_t* sizes, uint32_t* members_crc,
                     int32_t* status, int64_t* order, int64_t* runs, int64_t* num_runs) {
  *num_runs = 0;
  const int64_t width = num_fields + 1;
  std::vector<Span> spans;
  try {
    spans.reserve(static_cast<size_t>(n));
  } catch (const std::bad_alloc&) {
    return -1;
  }
  for (int64_t i = 0; i < n; i++) {
    int64_t *place = places + width * i, *size = sizes + width * i;
    status[2 * i] = kBadIndex, status[2 * i + 1] = 0;
    for (int64_t f = 0; f < width; f++) place[f] = 0, size[f] = -1;
    if (numbers[i] < 0 || numbers[i] >= num_shards) continue;
    const Shard shard = shard_at(shards, numbers[i]);
    const int64_t row = rows[i];
    if (row < 0 || row >= shard.rows) continue;
    const int64_t key_begin = row ? shard.key_ends[row - 1] : 0, key_end = shard.key_ends[row];
    if (key_begin < 0 || key_end < key_begin || key_end > shard.key_bytes) continue;
    const int32_t* column = columns + num_fields * numbers[i];
    int64_t begin = INT64_MAX, end = 0;
    bool good = true;
    for (int64_t f = 0; f < num_fields; f++) {
      members_crc[num_fields * i + f] = 0;
      if (column[f] < 0) continue;
      if (column[f] >= shard.fields) {
        good = false;
        break;
      }
      const int64_t cell = shard.fields * row + column[f];
      const int64_t from = shard.offsets[cell], bytes = shard.sizes[cell];
      if (bytes == -1) continue;
      if (from < 0 || bytes < 0 || bytes > kMaxSample || from > INT64_MAX - bytes - gap) {
        good = false;
        break;
      }
      place[f] = from, size[f] = bytes;  // in the file, as yet
      members_crc[num_fields * i + f] = shard.checksums[cell];
      begin = std::min(begin, from), end = std::max(end, from + bytes);
    }
    if (!good || (end > begin && end - begin > kMaxSample)) {
      for (int64_t f = 0; f < num_fields; f++) place[f] = 0, size[f] = -1;
      continue;
    }
    // as yet in the text of the keys
    place[num_fields] = key_begin, size[num_fields] = key_end - key_begin;
    status[2 * i] = kNotRead;
    spans.push_back({numbers[i], std::min(begin, end), end, i});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.shard != b.shard   ? a.shard < b.shard
           : a.begin != b.begin ? a.begin < b.begin
                                : a.sample < b.sample;
  });
  int64_t total = 0, count = 0;
  int64_t* run = nullptr;
  for (size_t k = 0; k < spans.size(); k++) {
    const Span& span = spans[k];
    order[k] = span.sample;
    const bool joins = run && run[0] == span.shard && span.begin <= run[2] + gap &&
                       (span.end <= run[2] || span.end - run[1] <= kRunBytes);
    if (!joins) {
      if (run) total += run[2] - run[1];
      total += -total & (kAlignment - 1);
      run = runs + kRunNumbers * count++;
      run[0] = span.shard, run[1] = span.begin, run[2] = span.end, run[3] = total;
      run[4] = static_cast<int64_t>(k);
    }
    run[2] = std::max(run[2], span.end);
    run[5] = static_cast<int64_t>(k) + 1;
    if (total > kMaxBuffer || run[2] - run[1] > kMaxBuffer) return -2;
    for (int64_t f = 0; f < num_fields; f++) {
      int64_t& place = places[width * span.sample + f];
      if (sizes[width * span.sample + f] >= 0) place += run[3] - run[1];
    }
  }
  if (run) total += run[2] - run[1];
  for (const Span& span : spans) total += sizes[width * span.sample + num_fields];
  *num_runs = count;
  return total > kMaxBuffer ? -2 : total;
}

// Copies the keys to the end of the buffer and sets their places. Returns 0; -1: they do not fit.
int32_t copy_keys(const int64_t* shards, int64_t num_shards, const int64_t* numbers, int64_t n,
                  int64_t num_fields, int64_t* places, const int64_t* sizes, uint8_t* buffer,
                  int64_t buffer_bytes) {
  const int64_t width = num_fields + 1;
  int64_t begin = buffer_bytes;
  for (int64_t i = 0; i < n; i++) {
    int64_t& place = places[width * i + num_fields];
    const int64_t size = sizes[width * i + num_fields];
    if (size < 0) continue;
    if (numbers[i] < 0 || numbers[i] >= num_shards || size > begin) return -1;
    const Shard shard = shard_at(shards, numbers[i]);
    if (place < 0 || size > shard.key_bytes || place > shard.key_bytes - size) return -1;
    begin -= size;
    std::memcpy(buffer + begin, shard.keys + place, static_cast<size_t>(size));
    place = begin;
  }
  return 0;
}

// Reads and verifies `num_runs` runs of a plan. fds (num_shards): open files, -1: none is open.
// The arrays are those of the plan; status of the runs' samples is set. threads: that read at once.
void read_members(const int64_t* runs, int64_t num_runs, const int64_t* order, int64_t num_order,
                  int64_t n, const int32_t* fds, int64_t num_shards, int64_t num_fields,
                  const int64_t* places, const int64_t* sizes, const uint32_t* members_crc,
                  uint8_t* buffer, int64_t buffer_bytes, int32_t threads, int32_t* status) {
  const int64_t width = num_fields + 1;
  const auto read_run = [&](const int64_t* run) {
    const int64_t size = run[2] - run[1], place = run[3];
    if (run[0] < 0 || run[0] >= num_shards || run[1] < 0 || size < 0 || place < 0 ||
        size > buffer_bytes || place > buffer_bytes - size || run[4] < 0 || run[5] > num_order) {
      return;
    }
    const int fd = fds[run[0]];
    int64_t done = 0;
    int failure = fd < 0 ? EBADF : 0;
    while (done < size && !failure) {
      const int64_t wanted = std::min(size - done, kMostBytesAtOnce);
      const ssize_t got = pread(fd, buffer + place + done, static_cast<size_t>(wanted),
                                static_cast<off_t>(run[1] + done));
      if (got == 0) break;
      if (got > 0) done += got;
      if (got < 0 && errno != EINTR) failure = errno;
    }
    const int64_t end = place + done;
    for (int64_t k = run[4]; k < run[5]; k++) {
      const int64_t sample = order[k];
      if (sample < 0 || sample >= n) continue;
      int32_t* result = status + 2 * sample;
      result[0] = failure ? kFailed : kGood, result[1] = failure;
      for (int64_t f = 0; f < num_fields && result[0] == kGood; f++) {
        const int64_t bytes = sizes[width * sample + f], at = places[width * sample + f];
        if (bytes < 0) continue;
        if (at < place || at > end || bytes > end - at) {
          result[0] = kShort;
        } else if (crc32c(buffer + at, bytes) != members_crc[num_fields * sample + f]) {
          result[0] = kDamaged, result[1] = static_cast<int32_t>(f);
        }
      }
    }
  };
  std::atomic<int64_t> next{0};
  const auto work = [&]() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_runs;) {
      read_run(runs + kRunNumbers * i);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, num_runs); i++) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads are to be had: these do it
  } catch (const std::bad_alloc&) {
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // extern "C"
