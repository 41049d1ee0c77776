"""The checksum of a block: CRC-32 as zlib has it.

By zlib-ng where that is installed: 12 GB/s on a core where most zlibs take 1 to 3, which is what fast disks wait for.
"""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # a machine that it is not built for, or a site that installs what it must
    from zlib import crc32

__all__ = ["crc32"]
