"""WebDataset shards: tars in which ``0001.txt``, ``0001.json`` and ``0001.jpg`` make one sample; manifests as
VLA Foundry writes them.

A plain tar on a disk can be read from any place once its headers are known, so its samples are found by
number, as rows of a table are: the order is random over all shards, the state is one integer, and a run goes
on in the middle of a shard. The package ``webdataset`` is not needed for it: it reads shards as streams,
front to back, through a shuffle buffer, and its place in a shard cannot be asked for.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from kempnerforge.config import registry
from kempnerforge.config.data import TableConfig
from kempnerforge.data.fingerprint import ends_checksum, file_fingerprint
from kempnerforge.data.sample import ImageSource, SampleError, Text
from kempnerforge.data.shards import Member, Shard, ShardError, index_tar
from kempnerforge.data.sources.keys import ANSWER, METADATA, PART, Keys, unknown_keys
from kempnerforge.data.sources.rows import parse_row
from kempnerforge.data.sources.shard_list import Listed, list_shards
from kempnerforge.data.sources.table import ENTRY, TableSource
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError

MAX_TEXT = 16 * 2**20
MAX_IMAGE = 256 * 2**20
"""Bytes of a member that is read."""
GLANCE = 2**14
"""Bytes at the head and at the tail of a shard that its fingerprint is made of."""
NUMBERED = re.compile(r"(\d+)\.(.+)")


@registry.register_data_config
@dataclass
class WebDatasetConfig(TableConfig):
    """Tar shards. A column is the extension of a member ("txt"), or a field of a JSON member ("json.caption",
    "json.meta.title"), or all of it ("json"; a member of that name with plain text is this text).

    Attributes:
        path: a tar, a directory of tars, a pattern ("shards/*.tar", "shards/{000..127}.tar"), a manifest
            (".jsonl", one line ``{"shard": "shard-0000", "num_sequences": 8}`` for each shard, with or
            without ".tar", below the manifest's directory), or several of them joined by "::". A manifest
            says how many samples there are; else all headers are read at the start.
        eval_path: as ``path``, for what is held out.
        manifest_counts: whether ``num_sequences`` counts samples. In manifests of VLA Foundry's
            ``text_untokenized`` shards it counts sequences of tokens: false reads all headers instead.
        image_column: extensions separated by ";", the first that is there counts. Several images of a sample
            are ``0001.0.jpg``, ``0001.1.jpg``.
    """

    source: str = "webdataset"
    manifest_counts: bool = True
    image_column: str = "jpg;jpeg;png;webp"
    answer_column: str = "txt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root:
            raise InputError(f"root = {self.root!r}: the images of source 'webdataset' are in its shards; leave it empty")


@registry.register_source("webdataset")
class WebDataset(TableSource):
    """Samples of tar shards, shard by shard, in the order of their first members.

    A shard that cannot be read, or has another number of samples than its manifest says, is refused at the
    start if it is the first one or in no manifest; one that is read later makes each of its samples an
    unusable one.

    Raises:
        ValueError: no shards; a manifest or a shard that cannot be read; no sample of the first shard has a
            configured member.
    """

    cfg: WebDatasetConfig
    usual = False

    def __init__(self, cfg: WebDatasetConfig, split: str) -> None:
        super().__init__(cfg, split)
        self._fields = self._known_fields()
        shards = list_shards(self.path, f"data.{'path' if self.path == cfg.path else 'eval_path'}")
        self._shards = [shard if cfg.manifest_counts else Listed(shard.path, None) for shard in shards]
        self._open: dict[int, Shard | ShardError] = {}
        counts = [len(self._shard(k)) if shard.samples is None or k == 0 else shard.samples for k, shard in enumerate(self._shards)]
        self._ends = list(accumulate(counts))
        filled = next((k for k, count in enumerate(counts) if count), None)
        if filled is not None:
            self._require_members(self._shard(filled))
            self.judge_keys(self.row, self._ends[filled])
        self.ignored.used.update(self.ignored.patterns)  # not all samples are looked at

    def __len__(self) -> int:
        return self._ends[-1]

    def row_id(self, index: int) -> str:
        number, offset = self._find(index)
        name = os.path.basename(self._shards[number].path)
        try:
            return f"{name}:{self._shard(number).key(offset)}"
        except ShardError:
            return f"{name}[{offset}]"

    def row(self, index: int) -> TarRow:
        number, offset = self._find(index)
        shard = self._shard(number)
        return TarRow(shard, shard.members(offset), self.cfg.image_column)

    def texts(self, index: int) -> tuple[Text, ...]:
        try:
            return self.texts_of(self.row(index))
        except SampleError as error:
            raise SampleError(f"{self.row_id(index)}: {error}") from None

    def row_key(self, row: Mapping[str, Any]) -> str:
        """Nothing: the key of a sample is in its name."""
        return ""

    def _images(self, row: Mapping[str, Any]) -> tuple[ImageSource, ...]:
        return self.images_of(row[self.cfg.image_column], self.cfg.image_column) if self.cfg.image_column else ()

    def _known_fields(self) -> Keys:
        """The known fields of JSON members: the columns, and what tools write beside a text and an image."""
        known: dict[str, Any] = dict.fromkeys(("caption", *METADATA))  # the caption comes from the .txt member
        for column in (name for name in self.text_columns if name.startswith("json.")):
            *path, last = column.split(".")[1:]
            table = known
            for name in path:
                below = table.get(name)
                table[name] = table = below if isinstance(below, dict) else {}
            table[last] = ENTRY if column == self.cfg.texts_column else ANSWER if column == self.cfg.answer_column else PART
        return known

    def problems(self, row: Mapping[str, Any]) -> Iterator[str]:
        assert isinstance(row, TarRow)
        images = image_extensions(self.cfg.image_column)
        read = {name for name in row.names() if name in self.text_columns or NUMBERED.sub(r"\2", name) in images}
        yield from unknown_keys(dict.fromkeys(row.names() - read - {"json"}), dict.fromkeys(sorted(read)), self.ignored)
        if "json" not in read and "json" in row.names() and not self.ignored("json"):
            yield from unknown_keys(row.fields(), self._fields, self.ignored, "json.")

    def length(self, index: int) -> int:
        """Bytes of the members that hold the texts."""
        return self._measure(index)[0]

    def num_images(self, index: int) -> int:
        return self._measure(index)[1]

    def fingerprint(self) -> str:
        """Of the content of the first shard, and a glance at the others: their names, sizes, heads and tails."""
        return digest(
            file_fingerprint(self._shards[0].path),
            *((shard.samples, os.path.basename(shard.path), *ends_checksum(shard.path, GLANCE)) for shard in self._shards),
        )

    def shards(self) -> Sequence[str]:
        return [str(shard.path) for shard in self._shards]

    def _measure(self, index: int) -> tuple[int, int]:
        """Bytes of texts and number of images; nothing for an unusable sample."""
        try:
            row = self.row(index)
            return sum(row.member(column).member.size for column in self.text_columns), len(row.images())
        except SampleError:
            return 0, 0

    def _find(self, index: int) -> tuple[int, int]:
        """The number of the shard of sample ``index``, and the sample's in it."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _shard(self, number: int) -> Shard:
        """Raises ShardError if it cannot be read, or is not what the manifest says."""
        if number not in self._open:
            try:
                self._open[number] = _checked(self._shards[number])
            except ShardError as error:
                self._open[number] = error
        shard = self._open[number]
        if isinstance(shard, ShardError):
            raise ShardError(str(shard))
        return shard

    def _require_members(self, shard: Shard) -> None:
        """Raises ValueError if no sample of ``shard`` has the members of a configured column."""
        columns = set(shard.extensions)
        columns.update([column for column in self.text_columns if column.partition(".")[0] in columns])
        if {NUMBERED.sub(r"\2", extension) for extension in columns}.intersection(image_extensions(self.cfg.image_column)):
            columns.add(self.cfg.image_column)
        self.require_columns(shard.path, columns)


class TextMember(NamedTuple):
    """The member of a text column.

    Attributes:
        extension: its name in the sample.
        fields: path of the field of a JSON member; empty for all of the member.
    """

    member: Member
    extension: str
    fields: list[str]


class TarRow(Mapping[str, Any]):
    """The columns of one sample; each is read when it is asked for.

    Args:
        image_column: the column whose value is a list of encoded images.
    """

    def __init__(self, shard: Shard, members: dict[str, Member], image_column: str) -> None:
        self._shard, self._members, self._image_column = shard, members, image_column

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, column: str) -> Any:
        """Raises SampleError for no such member or field, or one that is too large, not UTF-8 or not JSON."""
        if column == self._image_column:
            images = self.images()
            if not images:
                raise SampleError(
                    f"has no {' or '.join('.' + name for name in image_extensions(column))}; members: {_listed(self._members)}"
                )
            return [self._read(name, MAX_IMAGE) for name in images]
        name = (found := self.member(column)).extension
        content = self._read(name, MAX_TEXT)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SampleError(f".{name} is not UTF-8 at byte {error.start}") from None
        if name.split(".")[-1] != "json":
            return text.strip("\r\n")
        return _field(text, name, found.fields) if found.fields else _json_or_text(text)

    def names(self) -> set[str]:
        """The extensions of all members."""
        return set(self._members)

    def fields(self) -> Any:
        """What the JSON member holds; nothing if it is not JSON."""
        try:
            return parse_row(self._read("json", MAX_TEXT).decode("utf-8-sig"))
        except ValueError:
            return None

    def images(self) -> list[str]:
        """The extensions of the images, in order. Raises SampleError: there are both numbered ones and one
        without a number.
        """
        wanted = image_extensions(self._image_column)
        whole = next((name for name in wanted if name in self._members), None)
        matches = [(match, name) for name in self._members if (match := NUMBERED.fullmatch(name)) and match[2] in wanted]
        matches.sort(key=lambda found: wanted.index(found[0][2]), reverse=True)
        numbered = {int(match[1]): name for match, name in matches}  # of two with one number the first extension counts
        if whole and numbered:
            raise SampleError(f"has .{whole} and .{min(numbered.values())}: either one image or numbered ones")
        return [whole] if whole else [name for _, name in sorted(numbered.items())]

    def member(self, column: str) -> TextMember:
        """The member of a text column. Raises SampleError: the sample has no such member."""
        if column in self._members:
            return TextMember(self._members[column], column, [])
        name, *fields = column.split(".")
        if name not in self._members or name != "json":
            raise SampleError(f"has no .{column if name != 'json' else name}; members: {_listed(self._members)}")
        return TextMember(self._members[name], name, fields)

    def _read(self, name: str, limit: int) -> bytes:
        member = self._members[name]
        if member.size > limit:
            raise SampleError(f".{name} has {member.size} bytes, more than {limit}")
        return self._shard.read(member)


def image_extensions(column: str) -> list[str]:
    """The extensions that ``data.image_column`` names."""
    return [name for name in column.split(";") if name]


def _checked(listed: Listed) -> Shard:
    shard = index_tar(listed.path)
    if listed.samples is not None and len(shard) != listed.samples:
        raise ShardError(f"{listed.path}: {len(shard)} samples, but its manifest says num_sequences = {listed.samples}")
    return shard


def _field(text: str, name: str, fields: list[str]) -> Any:
    try:
        value = parse_row(text)
    except ValueError as error:
        raise SampleError(f".{name}: {error}") from None
    for depth, field in enumerate(fields):
        if type(value) is not dict or field not in value:
            raise SampleError(f".{name} has no field {'.'.join(fields[: depth + 1])!r}")
        value = value[field]
    return value


def _json_or_text(text: str) -> Any:
    """All of a JSON member; shards of plain text have members of this name, too, so anything but a string,
    list or object is the text itself.
    """
    try:
        value = parse_row(text)
    except ValueError:
        value = None
    return value if isinstance(value, str | list | dict) else text.strip("\r\n")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)[:20]) or "none"
