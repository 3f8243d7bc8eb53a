"""Rows as a table in Markdown, and the line that says where they are from."""


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def origin(rows, name):
    """Machine, versions, commit and date of the rows in bench/results/NAME.csv."""
    found = dict.fromkeys(
        f"{r['device']}; {r['versions']}; commit {r['commit']}, {r['date']}" for r in rows
    )
    return f"\n{'; and '.join(found)}. Rows: `bench/results/{name}.csv`.\n"
