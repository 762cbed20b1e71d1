"""Width and height of an encoded image, from the first bytes of its file.

The size is the stored one: EXIF orientation, which may swap the two when the picture is shown, is
not looked at. Nothing is decoded, so a file that is cut off or damaged behind its header still has
a size.
"""

import struct

#: What `image_size` gives for what it does not know.
UNKNOWN = (0, 0)

#: JPEG markers that begin a frame, and so carry the size: C0..CF without DHT, JPG and DAC.
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: JPEG markers without a length: TEM and the restarts.
STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))
#: JPEG markers behind which no frame header can come: end of image, start of scan.
AFTER_FRAME = frozenset((0xD9, 0xDA))


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP file in pixels; (0, 0) for anything else.

    data: the file or its beginning. A JPEG states its size behind its metadata, which may take some
    hundred KB (thumbnails, colour profiles); the others within the first 30 bytes.
    Never raises, whatever the bytes are.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return _known(*struct.unpack_from(">II", data, 16))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp(data)
    return UNKNOWN


def _jpeg(data: bytes) -> tuple[int, int]:
    position, end = 2, len(data)
    while position + 9 <= end:
        if data[position] != 0xFF:
            return UNKNOWN
        marker = data[position + 1]
        if marker == 0xFF:  # any number of them may come before a marker
            position += 1
        elif marker in STANDALONE:
            position += 2
        elif marker in START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return _known(width, height)
        elif marker in AFTER_FRAME:
            return UNKNOWN
        else:
            position += 2 + max(2, data[position + 2] << 8 | data[position + 3])
    return UNKNOWN


def _webp(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":  # 24 bits each, less one
        canvas = int.from_bytes(data[24:30], "little")
        return (canvas & 0xFFFFFF) + 1, (canvas >> 24) + 1
    if chunk == b"VP8L" and data[20] == 0x2F:  # 14 bits each, less one
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":  # 14 bits each, under 2 of scaling
        width, height = struct.unpack_from("<HH", data, 26)
        return _known(width & 0x3FFF, height & 0x3FFF)
    return UNKNOWN


def _known(width: int, height: int) -> tuple[int, int]:
    # PNG allows 31 bits; a height of 0 is legal in JPEG (it follows the scan) and of no use here
    return (width, height) if 0 < width < 2**31 and 0 < height < 2**31 else UNKNOWN
