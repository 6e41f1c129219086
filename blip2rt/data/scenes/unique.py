"""A set of scenes in which every text is true of one picture only."""

from collections import defaultdict
from collections.abc import Sequence

from .scene import Scene
from .truth import Reading, TruthChecker, holds


class UniqueTexts:
    """Takes scenes one by one, and refuses one whose texts are true of an earlier scene, or the other way round."""

    def __init__(self, checker: TruthChecker):
        self.checker = checker
        self._kept: dict[str, list[tuple[Scene, list[Reading]]]] = defaultdict(list)  # by place
        self._texts: set[str] = set()

    def add(self, scene: Scene, captions: Sequence[str]) -> bool:
        """Keep the scene if it is told apart from all that are kept; True: it was."""
        readings = [self.checker.read(text) for text in captions]
        names = {thing.name for thing in scene.things}
        if self._texts & set(captions):
            return False
        for other, others in self._kept[scene.place]:
            if names.isdisjoint(thing.name for thing in other.things):
                continue
            if any(_is_true(r, other) for r in readings) or any(_is_true(r, scene) for r in others):
                return False
        self._kept[scene.place].append((scene, readings))
        self._texts |= set(captions)
        return True


def _is_true(reading: Reading, scene: Scene) -> bool:
    return all(holds(fact, scene) for fact in reading.facts)
