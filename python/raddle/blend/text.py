"""Numbers and tables for eyes."""


def seconds_text(seconds):
    """Four digits, and no powers of ten for hours."""
    return f"{seconds:.0f} s" if seconds >= 1000 else f"{seconds:.4g} s"


def table_text(rows):
    """Rows of cells, the titles first, in columns: the first to the left, others to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
