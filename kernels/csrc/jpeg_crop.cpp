// A part of a JPEG at 1, 1/2, 1/4 or 1/8 -> RGB, bit for bit as libjpeg-turbo decodes it by default
// (accurate integer DCT, smooth interpolation of the chroma).
//
// Only what is common is decoded: sequential Huffman coding, 8 bits, one scan, grey or YCbCr of
// 4:4:4, 4:2:2 or 4:2:0. For anything else, and for every file that is not flawless up to the last
// row asked for, the answer is that a library has to look at it. The gain over a library:
//   - the bits are read 8 bytes at a time, from a copy without stuffing bytes;
//   - one lookup of 11 bits gives up to two coefficients, codes and values;
//   - blocks outside the part are only skipped, rows below it not even that.
// The file is not trusted: sizes are checked before use, and the copy ends in zeros for as long as
// one group of blocks can read on.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef __SSSE3__
#include <immintrin.h>
#endif

namespace {

constexpr int kLookAhead = 11;
constexpr int kEndOfBlock = 128;  // as a distance: beyond every block
constexpr size_t kBlockBytes = 64 * 4;             // no block takes more: 64 symbols of 31 bits
constexpr size_t kPadding = 6 * kBlockBytes + 64;  // 6 blocks in a group at most

// Position of the k-th coefficient; of those that a damaged block has beyond its end: 64, unused.
struct Zigzag {
  uint8_t at[256];
  Zigzag() {
    static const uint8_t order[64] = {
        0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
        41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
        30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
    std::memset(at, 64, sizeof at);
    std::memcpy(at, order, sizeof order);
  }
};
const Zigzag kZigzag;

struct Huffman {
  bool present = false;
  // By the next bits: symbol << 8 | bits of its code, 0 for longer codes.
  uint16_t symbols[1 << kLookAhead];
  // For AC: the next one or two coefficients, where they fit into the look-ahead with their values,
  // else 0. From the lowest bit: 8 bits each for the number of bits, the distances to the first
  // coefficient, to the second and to what follows; 16 for each value.
  uint64_t pairs[1 << kLookAhead];
  uint32_t limit[18];  // codes of n bits are below limit[n], left-aligned in 16 bits
  int32_t offset[17];
  uint8_t values[256];

  bool build(const uint8_t* counts, const uint8_t* symbols_in, int total, bool is_ac) {
    std::memset(symbols, 0, sizeof symbols);
    std::memset(values, 0, sizeof values);
    std::memcpy(values, symbols_in, static_cast<size_t>(total));
    uint32_t code = 0;
    int index = 0;
    for (int bits = 1; bits <= 16; bits++) {
      offset[bits] = index - static_cast<int32_t>(code);
      for (int i = 0; i < counts[bits - 1]; i++, index++, code++) {
        if (code >= (1u << bits)) return false;
        if (bits > kLookAhead) continue;
        const int free = kLookAhead - bits;
        const auto entry = static_cast<uint16_t>(values[index] << 8 | bits);
        std::fill_n(symbols + (code << free), 1 << free, entry);
      }
      limit[bits] = code << (16 - bits);
      if (code > (1u << bits)) return false;
      code <<= 1;
    }
    if (is_ac) build_pairs();
    present = true;
    return true;
  }

  void build_pairs() {
    for (uint32_t ahead = 0; ahead < 1u << kLookAhead; ahead++) {
      const Coefficient first = coefficient(ahead, kLookAhead);
      if (!first.bits) {
        pairs[ahead] = 0;
        continue;
      }
      // without a second coefficient a zero is written where the next one will be
      int bits = first.bits, at = first.run + 1, next = first.run + 1, value = 0;
      if (first.run < kEndOfBlock - 1) {
        const uint32_t rest = (ahead << bits) & ((1u << kLookAhead) - 1);
        const Coefficient second = coefficient(rest, kLookAhead - bits);
        if (second.bits) {
          bits += second.bits, value = second.value;
          at = next + second.run, next = at + 1;
        }
      }
      pairs[ahead] = static_cast<uint64_t>(bits | first.run << 8 | at << 16) |
                     static_cast<uint64_t>(next) << 24 |
                     static_cast<uint64_t>(static_cast<uint16_t>(first.value)) << 32 |
                     static_cast<uint64_t>(static_cast<uint16_t>(value)) << 48;
    }
  }

  struct Coefficient {
    int bits, run, value;
  };

  // At the head of a look-ahead of which `known` bits count; bits: 0 if it is not whole in there.
  Coefficient coefficient(uint32_t ahead, int known) const {
    const int symbol = symbols[ahead] >> 8, bits = symbols[ahead] & 255, size = symbol & 15;
    if (!bits || bits + size > known || (!size && symbol)) return {0, 0, 0};
    if (!size) return {bits, kEndOfBlock - 1, 0};
    int value = static_cast<int>(ahead >> (kLookAhead - bits - size)) & ((1 << size) - 1);
    if (value < 1 << (size - 1)) value -= (1 << size) - 1;
    return {bits + size, symbol >> 4, value};
  }
};

// Most significant bit first. `next` may lie in the padding, never beyond it.
struct Bits {
  const uint8_t* next;
  uint64_t window = 0;
  int count = 0;

  void refill() {  // to at least 56 bits
    uint64_t bytes;
    std::memcpy(&bytes, next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    bytes = __builtin_bswap64(bytes);
#endif
    window |= bytes >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  uint32_t peek(int n) const { return static_cast<uint32_t>(window >> (64 - n)); }
  void drop(int n) {
    window <<= n;
    count -= n;
  }
  int receive(int size) {  // 1..15 bits as a signed number
    int value = static_cast<int>(peek(size));
    drop(size);
    if (value < 1 << (size - 1)) value -= (1 << size) - 1;
    return value;
  }
};

inline int symbol_of(Bits& bits, const Huffman& table) {  // -1: no such code
  const uint32_t entry = table.symbols[bits.peek(kLookAhead)];
  if (entry) {
    bits.drop(static_cast<int>(entry & 255));
    return static_cast<int>(entry >> 8);
  }
  const uint32_t code = bits.peek(16);
  for (int n = kLookAhead + 1; n <= 16; n++) {
    if (code < table.limit[n]) {
      const int index = static_cast<int>(code >> (16 - n)) + table.offset[n];
      if (index < 0 || index > 255) return -1;
      bits.drop(n);
      return table.values[index];
    }
  }
  return -1;
}

// One block. Keep: into `block`, dequantised; `quant` has 256 entries, 0 beyond 63. *flat: whether
// the block has but its mean.
template <bool Keep>
inline bool read_block(Bits& bits, const Huffman& dc, const Huffman& ac, int& predictor,
                       const uint16_t* quant, int16_t* block, bool* flat) {
  bits.refill();
  const int size = symbol_of(bits, dc);
  if (size < 0 || size > 11) return false;
  if (size) predictor = static_cast<int16_t>(predictor + bits.receive(size));
  if (Keep) {
    std::memset(block, 0, 64 * sizeof(int16_t));
    block[0] = static_cast<int16_t>(predictor * quant[0]);
  }
  int k = 1, seen = 0;
  const auto keep = [&](int at, int value) {
    if (!Keep) return;
    block[kZigzag.at[at]] = static_cast<int16_t>(value * quant[at]);
    seen |= value;
  };
  const auto step = [&]() {  // one lookup; false for a code that is none
    const uint64_t pair = ac.pairs[bits.peek(kLookAhead)];
    const int first = k + static_cast<int>(pair >> 8 & 255);
    // behind the last coefficient of a full block comes the next block, not a second coefficient
    const bool has_next = first < 63 || first >= kEndOfBlock;
    if (__builtin_expect(pair != 0 && has_next, 1)) {
      bits.drop(pair & 63);
      keep(first, static_cast<int16_t>(pair >> 32));
      keep(k + (pair >> 16 & 255), static_cast<int16_t>(pair >> 48));
      k += pair >> 24 & 255;
      return true;
    }
    if (bits.count < 32) bits.refill();
    const int symbol = symbol_of(bits, ac);
    if (symbol < 0) return false;
    if (symbol & 15) {
      k += symbol >> 4;
      keep(k, bits.receive(symbol & 15));
      k++;
    } else {
      if (symbol && symbol != 0xF0) return false;  // such runs belong to progressive files
      k += symbol ? 16 : kEndOfBlock;
    }
    return true;
  };
  while (k < 64) {
    bits.refill();
    if (!step()) return false;
    if (k >= 64) break;
    if (!step()) return false;
  }
  if (Keep) *flat = seen == 0;
  return k == 64 || k >= kEndOfBlock;
}

// The inverse DCT of libjpeg (its jidctint.c and jidctred.c): 13 bits of fraction in the constants,
// 2 more in what the first pass leaves. Arithmetic wraps, as it does in the library.
typedef uint32_t Lanes __attribute__((vector_size(32)));
typedef int32_t SignedLanes __attribute__((vector_size(32)));
typedef int16_t ShortLanes __attribute__((vector_size(16)));
typedef uint8_t ByteLanes __attribute__((vector_size(8)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Lanes){__VA_ARGS__})
#endif

inline void transpose(const Lanes* in, Lanes* out) {
  Lanes pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = PICK(in[i], in[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = PICK(in[i], in[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; j++) {
      quads[i + 2 * j] = PICK(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * j + 1] = PICK(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; i++) {
    out[i] = PICK(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    out[i + 4] = PICK(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <int Shift>
inline Lanes descale(Lanes x) {
  return (Lanes)((SignedLanes)(x + (1u << (Shift - 1))) >> Shift);
}

inline Lanes times(Lanes x, int factor) { return x * static_cast<uint32_t>(factor); }

// Eight one-dimensional transforms of 8, 4 or 2 points from 8 coefficients, one in each lane.
template <int Shift>
inline void transform8(const Lanes* in, Lanes* out) {
  const Lanes even = times(in[2] + in[6], 4433);
  const Lanes even2 = even + times(in[6], -15137), even3 = even + times(in[2], 6270);
  const Lanes sum = (in[0] + in[4]) << 13, difference = (in[0] - in[4]) << 13;
  const Lanes a0 = sum + even3, a3 = sum - even3;
  const Lanes a1 = difference + even2, a2 = difference - even2;
  const Lanes z5 = times(in[7] + in[3] + in[5] + in[1], 9633);
  const Lanes z1 = times(in[7] + in[1], -7373), z2 = times(in[5] + in[3], -20995);
  const Lanes z3 = times(in[7] + in[3], -16069) + z5, z4 = times(in[5] + in[1], -3196) + z5;
  const Lanes b0 = times(in[7], 2446) + z1 + z3, b1 = times(in[5], 16819) + z2 + z4;
  const Lanes b2 = times(in[3], 25172) + z2 + z3, b3 = times(in[1], 12299) + z1 + z4;
  out[0] = descale<Shift>(a0 + b3), out[7] = descale<Shift>(a0 - b3);
  out[1] = descale<Shift>(a1 + b2), out[6] = descale<Shift>(a1 - b2);
  out[2] = descale<Shift>(a2 + b1), out[5] = descale<Shift>(a2 - b1);
  out[3] = descale<Shift>(a3 + b0), out[4] = descale<Shift>(a3 - b0);
}

template <int Shift>
inline void transform4(const Lanes* in, Lanes* out) {
  const Lanes first = in[0] << 14;
  const Lanes even = times(in[2], 15137) + times(in[6], -6270);
  const Lanes a0 = first + even, a2 = first - even;
  const Lanes b0 = times(in[7], -1730) + times(in[5], 11893) + times(in[3], -17799) +
                   times(in[1], 8697);
  const Lanes b2 = times(in[7], -4176) + times(in[5], -4926) + times(in[3], 7373) +
                   times(in[1], 20995);
  out[0] = descale<Shift + 1>(a0 + b2), out[3] = descale<Shift + 1>(a0 - b2);
  out[1] = descale<Shift + 1>(a2 + b0), out[2] = descale<Shift + 1>(a2 - b0);
}

template <int Shift>
inline void transform2(const Lanes* in, Lanes* out) {
  const Lanes first = in[0] << 15;
  const Lanes odd = times(in[7], -5906) + times(in[5], 6967) + times(in[3], -10426) +
                    times(in[1], 29692);
  out[0] = descale<Shift + 2>(first + odd), out[1] = descale<Shift + 2>(first - odd);
}

// The library's vector code has 16 bits between its passes. No picture needs them: what would not
// fit is noted, and the file is left to the library.
constexpr int kMostInColumn = 5800, kMostInRow = 32767;

inline void note_beyond(const Lanes* lines, int most, SignedLanes& beyond) {
  SignedLanes sum = {};
  for (int i = 0; i < 8; i++) {
    const auto x = (SignedLanes)lines[i];
    sum += x < 0 ? -x : x;
  }
  beyond |= sum > most;
}

// A block -> Size x Size samples.
template <int Size>
void inverse_dct(const int16_t* block, bool flat, uint8_t* to, size_t stride,
                 SignedLanes& beyond) {
  if (Size == 1 || flat) {
    if (block[0] > kMostInColumn || block[0] < -kMostInColumn) beyond |= 1;
    const int value = std::min(std::max(((block[0] + 4) >> 3) + 128, 0), 255);
    for (int row = 0; row < Size; row++) std::memset(to + row * stride, value, Size);
    return;
  }
  Lanes lines[8], pass[8] = {};
  for (int row = 0; row < 8; row++) {
    ShortLanes coefficients;
    std::memcpy(&coefficients, block + 8 * row, sizeof coefficients);
    lines[row] = (Lanes)__builtin_convertvector(coefficients, SignedLanes);
  }
  note_beyond(lines, kMostInColumn, beyond);
  if (Size == 8) transform8<11>(lines, pass);
  if (Size == 4) transform4<11>(lines, pass);
  if (Size == 2) transform2<11>(lines, pass);
  transpose(pass, lines);
  note_beyond(lines, kMostInRow, beyond);
  if (Size == 8) transform8<18>(lines, pass);
  if (Size == 4) transform4<18>(lines, pass);
  if (Size == 2) transform2<18>(lines, pass);
  transpose(pass, lines);
  for (int row = 0; row < Size; row++) {
    SignedLanes x = (SignedLanes)lines[row] + 128;
    x = x < 0 ? SignedLanes{} : x;
    x = x > 255 ? SignedLanes{} + 255 : x;
    const ByteLanes samples = __builtin_convertvector(x, ByteLanes);
    std::memcpy(to + row * stride, &samples, Size);
  }
}

void to_samples(int size, const int16_t* block, bool flat, uint8_t* to, size_t stride,
                SignedLanes& beyond) {
  if (size == 8) inverse_dct<8>(block, flat, to, stride, beyond);
  if (size == 4) inverse_dct<4>(block, flat, to, stride, beyond);
  if (size == 2) inverse_dct<2>(block, flat, to, stride, beyond);
  if (size == 1) inverse_dct<1>(block, flat, to, stride, beyond);
}

struct Range {
  int begin, end;
  bool holds(int i) const { return begin <= i && i < end; }
};

struct Component {
  int id, h, v, quant, dc, ac;
  int size;             // samples on a side of a block at this scale
  bool doubled_x, doubled_y;  // to be interpolated
  int width, height;    // samples of the whole picture
  Range blocks_x, blocks_y;
  std::vector<uint8_t> plane;  // the samples of these blocks
  size_t stride;
  int predictor;

  const uint8_t* row(int y) const {  // so that [x] is the sample at column x of the picture
    return plane.data() + (y - blocks_y.begin * size) * static_cast<ptrdiff_t>(stride) -
           blocks_x.begin * size;
  }
};

struct Decoder {
  const uint8_t* data;
  size_t length;
  int width, height;
  bool jfif = false;
  int adobe = -1;
  int restart_interval = 0;
  int components = 0;
  Component component[3];
  int max_h = 1, max_v = 1;
  bool has_quant[4] = {};
  uint16_t quant[4][256] = {};
  Huffman dc[4], ac[4];
  size_t scan = 0;  // where the coded data begins
  std::unique_ptr<uint8_t[]> coded;
  std::vector<size_t> segments;  // where each restart interval begins in it; one more: the end

  bool headers();
  bool quant_tables(const uint8_t* at, size_t size);
  bool huffman_tables(const uint8_t* at, size_t size);
  bool frame(const uint8_t* at, size_t size);
  bool scan_header(const uint8_t* at, size_t size);
  bool colours() const;
  bool unstuff();
  bool place(int scale, int x, int y, int w, int h);
  bool read_blocks();
  bool crop(int scale, int x, int y, int w, int h, uint8_t* out);
};

bool Decoder::headers() {
  if (length < 4 || data[0] != 0xFF || data[1] != 0xD8) return false;
  for (size_t at = 2;;) {
    if (at + 4 > length || data[at] != 0xFF) return false;
    const int marker = data[at + 1];
    const size_t size = static_cast<size_t>(data[at + 2] << 8 | data[at + 3]);
    if (size < 2 || at + 2 + size > length) return false;
    const uint8_t* body = data + at + 4;
    at += 2 + size;
    const size_t left = size - 2;
    bool fine = true;
    if (marker == 0xC0 || marker == 0xC1) fine = frame(body, left);
    else if (marker == 0xC4) fine = huffman_tables(body, left);
    else if (marker == 0xDB) fine = quant_tables(body, left);
    else if (marker == 0xDD) {
      fine = left == 2;
      if (fine) restart_interval = body[0] << 8 | body[1];
    } else if (marker == 0xDA) {
      scan = at;
      return scan_header(body, left) && colours();
    } else if (marker == 0xE0) {
      if (left >= 12 && !std::memcmp(body, "JFIF", 5)) jfif = true;
    } else if (marker == 0xEE) {
      if (left >= 12 && !std::memcmp(body, "Adobe", 5)) adobe = body[11];
    } else if (!(marker >= 0xE0 && marker <= 0xEF) && marker != 0xFE) {
      return false;
    }
    if (!fine) return false;
  }
}

bool Decoder::quant_tables(const uint8_t* at, size_t size) {
  while (size) {
    const int id = *at & 15, bytes = *at >> 4 ? 2 : 1;
    const size_t needed = 1 + 64 * static_cast<size_t>(bytes);
    if (id > 3 || size < needed) return false;
    for (int k = 0; k < 64; k++) {
      quant[id][k] = static_cast<uint16_t>(bytes == 2 ? at[1 + 2 * k] << 8 | at[2 + 2 * k]
                                                      : at[1 + k]);
    }
    has_quant[id] = true;
    at += needed, size -= needed;
  }
  return true;
}

bool Decoder::huffman_tables(const uint8_t* at, size_t size) {
  while (size) {
    if (size < 17) return false;
    const int id = *at & 15, kind = *at >> 4;
    int total = 0;
    for (int i = 1; i <= 16; i++) total += at[i];
    if (id > 3 || kind > 1 || total > 256 || size < 17 + static_cast<size_t>(total)) return false;
    // the library refuses lengths of a mean that cannot be, though no block may have them
    for (int i = 0; i < total && !kind; i++) {
      if (at[17 + i] > 15) return false;
    }
    if (!(kind ? ac : dc)[id].build(at + 1, at + 17, total, kind)) return false;
    at += 17 + total, size -= 17 + static_cast<size_t>(total);
  }
  return true;
}

bool Decoder::frame(const uint8_t* at, size_t size) {
  if (components || size < 6 || at[0] != 8) return false;
  if ((at[1] << 8 | at[2]) != height || (at[3] << 8 | at[4]) != width) return false;
  if (width > 65500 || height > 65500) return false;  // the library's limit
  const int count = at[5];
  if ((count != 1 && count != 3) || size != 6 + 3 * static_cast<size_t>(count)) return false;
  for (int i = 0; i < count; i++) {
    Component& c = component[i];
    c.id = at[6 + 3 * i], c.h = at[7 + 3 * i] >> 4, c.v = at[7 + 3 * i] & 15;
    c.quant = at[8 + 3 * i];
    // grey, 4:4:4, 4:2:2 and 4:2:0
    if (c.quant > 3 || c.h < 1 || c.v < 1 || c.h > 2 || c.v > c.h) return false;
    if ((i || count == 1) && (c.h != 1 || c.v != 1)) return false;
    max_h = std::max(max_h, c.h), max_v = std::max(max_v, c.v);
  }
  components = count;
  return width > 0 && height > 0;
}

bool Decoder::scan_header(const uint8_t* at, size_t size) {
  if (!components || size != 4 + 2 * static_cast<size_t>(components)) return false;
  if (at[0] != components) return false;
  for (int i = 0; i < components; i++) {
    Component& c = component[i];
    c.dc = at[2 + 2 * i] >> 4, c.ac = at[2 + 2 * i] & 15;
    if (at[1 + 2 * i] != c.id || c.dc > 3 || c.ac > 3) return false;
    if (!dc[c.dc].present || !ac[c.ac].present || !has_quant[c.quant]) return false;
  }
  const uint8_t* spectrum = at + 1 + 2 * components;
  return spectrum[0] == 0 && spectrum[1] == 63 && spectrum[2] == 0;
}

bool Decoder::colours() const {  // as the library guesses them; only YCbCr
  if (components == 1 || jfif) return true;
  if (adobe >= 0) return adobe == 1;
  return component[0].id == 1 && component[1].id == 2 && component[2].id == 3;
}

bool Decoder::unstuff() {
  const uint8_t *from = data + scan, *end = data + length;
  coded.reset(new uint8_t[length - scan + kPadding]);
  uint8_t* to = coded.get();
  segments.assign(1, 0);
  for (int restarts = 0;;) {
    const auto* mark = static_cast<const uint8_t*>(
        std::memchr(from, 0xFF, static_cast<size_t>(end - from)));
    if (!mark || mark + 1 >= end) return false;  // cut off
    std::memcpy(to, from, static_cast<size_t>(mark - from));
    to += mark - from, from = mark + 2;
    const int marker = mark[1];
    if (marker == 0) {
      *to++ = 0xFF;
    } else if (marker == 0xD0 + (restarts & 7) && restart_interval) {
      restarts++;
      segments.push_back(static_cast<size_t>(to - coded.get()));
    } else if (marker == 0xD9) {
      break;
    } else {
      return false;
    }
  }
  segments.push_back(static_cast<size_t>(to - coded.get()));
  std::memset(to, 0, kPadding);
  return true;
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Which blocks a part of the picture at 1/scale needs.
bool Decoder::place(int scale, int x, int y, int w, int h) {
  const int least = 8 / scale;
  if (x < 0 || y < 0 || w < 1 || h < 1) return false;
  if (w > divide_up(width, scale) - x || h > divide_up(height, scale) - y) return false;
  for (int i = 0; i < components; i++) {
    Component& c = component[i];
    c.size = least;  // the library lets the DCT enlarge the chroma where it can
    while (c.size < 8 && max_h * least % (c.h * c.size * 2) == 0 &&
           max_v * least % (c.v * c.size * 2) == 0) {
      c.size *= 2;
    }
    c.doubled_x = max_h * least == 2 * c.h * c.size;
    c.doubled_y = max_v * least == 2 * c.v * c.size;
    c.width = divide_up(static_cast<int64_t>(width) * c.h * c.size, 8 * max_h);
    c.height = divide_up(static_cast<int64_t>(height) * c.v * c.size, 8 * max_v);
    if (c.doubled_y && !c.doubled_x) return false;
    if (c.doubled_x && c.width <= 2) return false;  // not interpolated by the library
    Range columns{x, x + w}, rows{y, y + h};
    if (c.doubled_x) columns = {x / 2 - 1, (x + w - 1) / 2 + 2};
    if (c.doubled_y) rows = {y / 2 - 1, (y + h - 1) / 2 + 2};
    columns = {std::max(columns.begin, 0), std::min(columns.end, c.width)};
    rows = {std::max(rows.begin, 0), std::min(rows.end, c.height)};
    c.blocks_x = {columns.begin / c.size, divide_up(columns.end, c.size)};
    c.blocks_y = {rows.begin / c.size, divide_up(rows.end, c.size)};
    c.stride = static_cast<size_t>(c.blocks_x.end - c.blocks_x.begin) * c.size;
    c.plane.resize(c.stride * (c.blocks_y.end - c.blocks_y.begin) * c.size);
  }
  return true;
}

bool Decoder::read_blocks() {
  const int groups_x = divide_up(width, 8 * max_h), groups_y = divide_up(height, 8 * max_v);
  const int64_t groups = static_cast<int64_t>(groups_x) * groups_y;
  const int64_t interval = restart_interval ? restart_interval : groups;
  if (static_cast<int64_t>(segments.size()) - 1 != (groups + interval - 1) / interval) return false;
  int first_row = groups_y, rows = 0;  // of groups, that are needed
  for (int i = 0; i < components; i++) {
    first_row = std::min(first_row, component[i].blocks_y.begin / component[i].v);
    rows = std::max(rows, divide_up(component[i].blocks_y.end, component[i].v));
  }
  alignas(32) int16_t block[72];
  SignedLanes beyond = {};
  const int64_t end = static_cast<int64_t>(rows) * groups_x;
  for (int64_t group = 0; group < end;) {
    const int64_t segment = group / interval;
    const int64_t segment_end = std::min(end, (segment + 1) * interval);
    if (segment_end <= static_cast<int64_t>(first_row) * groups_x) {
      group = segment_end;
      continue;
    }
    Bits bits{coded.get() + segments[static_cast<size_t>(segment)]};
    const uint8_t* stop = coded.get() + segments[static_cast<size_t>(segment) + 1];
    for (int i = 0; i < components; i++) component[i].predictor = 0;
    int gx = static_cast<int>(group % groups_x), gy = static_cast<int>(group / groups_x);
    for (; group < segment_end; group++) {
      for (int i = 0; i < components; i++) {
        Component& c = component[i];
        for (int v = 0; v < c.v; v++) {
          const int by = gy * c.v + v;
          const bool in_rows = c.blocks_y.holds(by);
          for (int u = 0; u < c.h; u++) {
            const int bx = gx * c.h + u;
            bool flat = true;
            if (!in_rows || !c.blocks_x.holds(bx)) {
              if (!read_block<false>(bits, dc[c.dc], ac[c.ac], c.predictor, nullptr, nullptr,
                                     nullptr)) {
                return false;
              }
              continue;
            }
            if (!read_block<true>(bits, dc[c.dc], ac[c.ac], c.predictor, quant[c.quant], block,
                                  &flat)) {
              return false;
            }
            uint8_t* to = c.plane.data() +
                          static_cast<size_t>(by - c.blocks_y.begin) * c.size * c.stride +
                          static_cast<size_t>(bx - c.blocks_x.begin) * c.size;
            to_samples(c.size, block, flat, to, c.stride, beyond);
          }
        }
      }
      if (bits.next - bits.count / 8 > stop) return false;  // more than the file has
      if (++gx == groups_x) gx = 0, gy++;
    }
  }
  for (int i = 0; i < 8; i++) {
    if (beyond[i]) return false;
  }
  return true;
}

// n pixels; all rows may be read and written up to the next multiple of 16.
void to_rgb(const uint8_t* __restrict y, const uint8_t* __restrict cb, const uint8_t* __restrict cr,
            int n, uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b) {
  for (int i = 0; i < n; i++) {
    const int blue = cb[i] - 128, red = cr[i] - 128, gray = y[i];
    const int r_ = gray + ((91881 * red + 32768) >> 16);
    const int g_ = gray + ((-22554 * blue - 46802 * red + 32768) >> 16);
    const int b_ = gray + ((116130 * blue + 32768) >> 16);
    r[i] = static_cast<uint8_t>(std::min(std::max(r_, 0), 255));
    g[i] = static_cast<uint8_t>(std::min(std::max(g_, 0), 255));
    b[i] = static_cast<uint8_t>(std::min(std::max(b_, 0), 255));
  }
}

void interleave(const uint8_t* r, const uint8_t* g, const uint8_t* b, int n, uint8_t* out) {
  int i = 0;
#ifdef __SSSE3__
  const __m128i r0 = _mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5);
  const __m128i g0 = _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1);
  const __m128i b0 = _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1);
  const __m128i r1 = _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1);
  const __m128i g1 = _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10);
  const __m128i b1 = _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1);
  const __m128i r2 = _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1);
  const __m128i g2 = _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1);
  const __m128i b2 = _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15);
  for (; i + 16 <= n; i += 16) {
    const __m128i red = _mm_loadu_si128(reinterpret_cast<const __m128i*>(r + i));
    const __m128i green = _mm_loadu_si128(reinterpret_cast<const __m128i*>(g + i));
    const __m128i blue = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i));
    auto* to = reinterpret_cast<__m128i*>(out + 3 * static_cast<size_t>(i));
    const auto mix = [&](__m128i x, __m128i y, __m128i z) {
      return _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, x), _mm_shuffle_epi8(green, y)),
                          _mm_shuffle_epi8(blue, z));
    };
    _mm_storeu_si128(to, mix(r0, g0, b0));
    _mm_storeu_si128(to + 1, mix(r1, g1, b1));
    _mm_storeu_si128(to + 2, mix(r2, g2, b2));
  }
#endif
  for (; i < n; i++) out[3 * i] = r[i], out[3 * i + 1] = g[i], out[3 * i + 2] = b[i];
}

// A row of chroma at twice its width: columns x..x+w-1 of the picture. Beyond the edges the samples
// at the edges count, which is what the library's special cases come to.
void widen(const Component& c, bool smooth, int y, int x, int w, int16_t* sums, uint8_t* doubled) {
  const int first = x / 2, count = (x + w - 1) / 2 - first + 1;
  const int near = c.doubled_y ? y / 2 : y;
  const uint8_t* samples = c.row(near);
  if (!smooth) {
    for (int i = 0; i < w; i++) doubled[i] = samples[(x + i) / 2];
    return;
  }
  const int begin = std::max(first - 1, 0), end = std::min(first + count + 1, c.width);
  int16_t* sum = sums + 1 - first;  // sum[column], columns first-1..first+count
  uint8_t* to = doubled;
  const int16_t* at = sums + 1;
  if (c.doubled_y) {
    const int beyond = std::min(std::max(y & 1 ? near + 1 : near - 1, 0), c.height - 1);
    const uint8_t* far = c.row(beyond);
    for (int i = begin; i < end; i++) sum[i] = static_cast<int16_t>(3 * samples[i] + far[i]);
  } else {
    for (int i = begin; i < end; i++) sum[i] = samples[i];
  }
  if (begin == first) sum[first - 1] = sum[first];
  if (end == first + count) sum[first + count] = sum[first + count - 1];
  const int shift = c.doubled_y ? 4 : 2;
  const int left = c.doubled_y ? 8 : 1, right = c.doubled_y ? 7 : 2;
  for (int i = 0; i < count; i++) {
    to[2 * i] = static_cast<uint8_t>((3 * at[i] + at[i - 1] + left) >> shift);
    to[2 * i + 1] = static_cast<uint8_t>((3 * at[i] + at[i + 1] + right) >> shift);
  }
}

bool Decoder::crop(int scale, int x, int y, int w, int h, uint8_t* out) {
  if (!headers() || !place(scale, x, y, w, h) || !unstuff() || !read_blocks()) return false;
  std::vector<uint8_t> lines(5 * (static_cast<size_t>(w) + 32));
  std::vector<int16_t> sums(static_cast<size_t>(w) / 2 + 8);
  uint8_t* line[5];
  for (size_t i = 0; i < 5; i++) line[i] = lines.data() + i * (static_cast<size_t>(w) + 32);
  for (int row = y; row < y + h; row++, out += 3 * static_cast<size_t>(w)) {
    const uint8_t* gray = component[0].row(row) + x;
    if (components == 1) {
      interleave(gray, gray, gray, w, out);
      continue;
    }
    const uint8_t* chroma[2];
    for (int i = 0; i < 2; i++) {
      const Component& c = component[i + 1];
      chroma[i] = c.row(row) + x;
      if (c.doubled_x) {
        widen(c, scale != 8, row, x, w, sums.data(), line[i]);
        chroma[i] = line[i] + (scale != 8 ? x & 1 : 0);
      }
    }
    to_rgb(gray, chroma[0], chroma[1], w, line[2], line[3], line[4]);
    interleave(line[2], line[3], line[4], w, out);
  }
  return true;
}

}  // namespace

// The part [x, x + w) x [y, y + h) of a JPEG of width x height pixels at 1/scale -> out, (h, w, 3).
// Returns 0, or 1 where a library has to look at the file; out may then be written partly.
extern "C" int32_t jpeg_crop(const uint8_t* data, uint64_t length, int32_t width, int32_t height,
                             int32_t scale, int32_t x, int32_t y, int32_t w, int32_t h,
                             uint8_t* out) {
  try {
    if (scale != 1 && scale != 2 && scale != 4 && scale != 8) return 1;
    std::unique_ptr<Decoder> decoder(new Decoder);
    decoder->data = data;
    decoder->length = length;
    decoder->width = width;
    decoder->height = height;
    return decoder->crop(scale, x, y, w, h, out) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
