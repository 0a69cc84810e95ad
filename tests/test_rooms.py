"""The rooms of the package: imports go one way, from the service down to the devices."""

import ast

from demo.server import ROOT

# From the top down. A room imports from those below it; the modules of one level do not import each other, a room's own may.
LEVELS = (
    ("__main__",),
    ("service",),
    ("finetune", "generate", "pipeline"),
    ("report",),
    ("training",),
    ("weights",),
    ("data", "tokens", "lora"),
    ("model", "job"),
    ("request", "config"),
    ("options",),
    ("transformer",),
    ("errors", "devices", "distributed"),
)


def arrows() -> set[tuple[str, str, str]]:
    """Room, room that it imports from, and the module that does so; imports within functions count too."""
    package, found = ROOT / "placeholder", set()
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package)
        room = module.parts[0].removesuffix(".py")
        if room == "__init__":  # the public names, imported when they are first wanted
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "placeholder":
                parts = node.module.split(".")
                for other in [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]:
                    found.add((room, other, module.as_posix()))
    return found


def test_every_import_between_rooms_goes_down():
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    wrong = [
        f"{module} imports from {other}"
        for room, other, module in sorted(arrows())
        if room != other and not (level[room] < level[other] or LEVELS[-1] == LEVELS[level[room]] == LEVELS[level[other]])
    ]
    assert not wrong
