"""Numbers of bytes as people read them."""


def human_bytes(bits: float) -> str:
    """Returns a number of bits as bytes with a binary unit: 13,463,872 → "1.61 MiB"."""
    size = bits / 8
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
