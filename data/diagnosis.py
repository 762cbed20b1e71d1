"""The closed list of what can be wrong or unusual with a data set, and what is done about it."""

from enum import StrEnum


class Policy(StrEnum):
    """What training does. `groundwork shards verify` fails for all but ACCEPT."""

    ACCEPT = "accept"  # the sample is used; noted, not counted as bad
    TOLERATE = "tolerate"  # training does not notice; `repair` mends it
    QUARANTINE = "quarantine"  # noted in quarantine.jsonl, counted, another sample stands in
    REFUSE = "refuse"  # the shard is not opened: no run begins on it
    STOP = "stop"  # the data set is not opened


class Diagnosis(StrEnum):
    """What is wrong. The value is the name in messages, reports and `quarantine.jsonl`.

    policy: what training does about it. meaning: what was found, in one sentence.
    """

    policy: Policy
    meaning: str

    def __new__(cls, name: str, policy: Policy, meaning: str) -> "Diagnosis":
        member = str.__new__(cls, name)
        member._value_ = name
        member.policy = policy
        member.meaning = meaning
        return member

    # the data set
    BAD_MANIFEST = "bad-manifest", Policy.STOP, "manifest.json cannot be read or is not one"
    BAD_CONCEPTS = "bad-concepts", Policy.STOP, "concepts.json cannot be read or is not one"
    MISSING_SHARD = "missing-shard", Policy.STOP, "a tar that was promised is not there"
    WRONG_SIZE = "wrong-size", Policy.STOP, "a tar has another size than the manifest says"
    WRONG_COUNT = (
        "wrong-count",
        Policy.REFUSE,
        "a tar holds another number of samples than the manifest says",
    )
    WRONG_TAR_CHECKSUM = (
        "wrong-tar-checksum",
        Policy.TOLERATE,
        "a tar is not the one the manifest describes, though all its members are whole",
    )
    KEY_IN_TWO_SHARDS = (
        "key-in-two-shards",
        Policy.TOLERATE,
        "two shards of a split have a sample of the same key",
    )

    # the tar
    NOT_A_TAR = "not-a-tar", Policy.REFUSE, "the file is empty, compressed, a web page, ..."
    TRUNCATED_TAR = "truncated-tar", Policy.REFUSE, "the tar ends before its last member does"
    DAMAGED_TAR = "damaged-tar", Policy.REFUSE, "a header of the tar cannot be read"
    JOINED_TARS = "joined-tars", Policy.REFUSE, "something follows the end of the archive"
    UNSAFE_PATH = "unsafe-path", Policy.REFUSE, "a member has an absolute path, or one with '..'"
    SPECIAL_MEMBER = "special-member", Policy.REFUSE, "a member is a link or a device"
    SPARSE_MEMBER = "sparse-member", Policy.REFUSE, "a member is a sparse file"
    GLOBAL_HEADER = (
        "global-header",
        Policy.REFUSE,
        "a global pax header sets the name or the size of all members",
    )
    PAX_HEADER = "pax-header", Policy.ACCEPT, "members have pax headers (long or foreign names)"
    REPEATED_KEY = "repeated-key", Policy.REFUSE, "a key comes back, with other keys between"
    REPEATED_FIELD = (
        "repeated-field",
        Policy.REFUSE,
        "two members side by side have the same key and field: a key given twice",
    )
    TOO_MANY_FIELDS = (
        "too-many-fields",
        Policy.REFUSE,
        "nearly every member has an extension of its own: dots in the names",
    )

    # the side-car
    MISSING_INDEX = "missing-index", Policy.ACCEPT, "there is no side-car; one is made"
    OUTDATED_INDEX = "outdated-index", Policy.ACCEPT, "a side-car of version 1; a new one is made"
    DAMAGED_INDEX = "damaged-index", Policy.REFUSE, "the side-car cannot be read"
    WRONG_INDEX = "wrong-index", Policy.REFUSE, "the side-car was made for another tar"

    # the sample
    UNREADABLE = "unreadable", Policy.QUARANTINE, "the disk or the network does not give the bytes"
    DAMAGED_MEMBER = (
        "damaged-member",
        Policy.QUARANTINE,
        "a member does not have the checksum that the side-car says: a flipped bit, or a side-car "
        "of another tar of the same size",
    )
    MISSING_IMAGE = "missing-image", Policy.QUARANTINE, "a sample has no image and nothing else"
    MISSING_CAPTION = "missing-caption", Policy.QUARANTINE, "a sample has neither text nor class"
    MISSING_FIELD = "missing-field", Policy.QUARANTINE, "a sample lacks a field that is required"
    EMPTY_IMAGE = "empty-image", Policy.QUARANTINE, "the image member has no bytes"
    NOT_AN_IMAGE = (
        "not-an-image",
        Policy.QUARANTINE,
        "the image member is something else, such as a web page",
    )
    DAMAGED_IMAGE = "damaged-image", Policy.QUARANTINE, "an image that cannot be decoded to its end"
    TOO_MANY_PIXELS = "too-many-pixels", Policy.QUARANTINE, "a decompression bomb"
    BAD_TEXT = "bad-text", Policy.QUARANTINE, "the member txt is not UTF-8"
    BAD_JSON = "bad-json", Policy.QUARANTINE, "the member json is not a JSON object"
    BAD_LABEL = "bad-label", Policy.QUARANTINE, "json.label is not a class index"
    BAD_KEY = "bad-key", Policy.QUARANTINE, "the key cannot be written as the stem of a file"
    UNUSABLE = "unusable", Policy.QUARANTINE, "what reads the samples refuses it, with a reason"
    UNSAFE_FIELD = (
        "unsafe-field",
        Policy.ACCEPT,
        "a member of a format that can hold code (pickle and the like), or whose extension is not "
        "ASCII; it is passed over",
    )
    CMYK_IMAGE = "cmyk-image", Policy.ACCEPT, "converted to RGB"
    DEEP_IMAGE = "16-bit-image", Policy.ACCEPT, "brought to 8 bits"
    ROTATED_IMAGE = "rotated-image", Policy.ACCEPT, "turned upright as EXIF says"
    ANIMATED_IMAGE = "animated-image", Policy.ACCEPT, "the first frame is taken"

    @property
    def is_bad(self) -> bool:
        """Whether `verify` fails for it."""
        return self.policy is not Policy.ACCEPT
