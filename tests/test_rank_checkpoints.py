"""Checkpoints of several processes are of the same turn."""

import pytest

import fitcompress as fc
from fitcompress.ranks import Ranks
from fitcompress.sensitivity.checkpoint import Checkpoint


def test_a_checkpoint_is_of_the_same_turn_everywhere(tmp_path, net, images) -> None:
    moments = fc.measure_fisher(net, [images], progress=False)

    class Pair(Ranks):
        """The first of two processes; the other one has the turns ``theirs``."""

        def __init__(self) -> None:
            self.group, self.rank, self.count = None, 0, 2
            self.theirs: list[int] = []

        def gather(self, value):
            return [value, self.theirs]

        def any(self, *flags):
            return list(flags)

    def checkpoint(theirs) -> Checkpoint:
        ranks = Pair()
        ranks.theirs = theirs
        made = Checkpoint(tmp_path / "state", ranks)
        made.key = "key"
        return made

    assert checkpoint([]).load() is None
    checkpoint([]).save(moments, 4)
    file = tmp_path / "state.rank0-of-2"
    old = file.read_bytes()
    checkpoint([]).save(moments, 7)
    for theirs, wanted in (([7], 7), ([4, 7], 7), ([4], None), ([], None)):
        state = checkpoint(theirs)
        assert (state.load() is not None) == (wanted is not None)
        assert state.turn == (wanted or 0)
    # killed after it had written, before all had
    file.rename(tmp_path / "state.rank0-of-2.next")
    file.write_bytes(old)
    for theirs, wanted in (([4], 4), ([7], 7)):
        state = checkpoint(theirs)
        assert state.load() is not None
        assert state.turn == wanted

    # killed again when it had written turn 10, and the other one had not
    def killed(*_: bool) -> list[bool]:
        raise KeyboardInterrupt

    state._ranks.any = killed
    with pytest.raises(KeyboardInterrupt):
        state.save(moments, 10)
    state = checkpoint([7])
    assert state.load() is not None
    assert state.turn == 7
    state.remove()
    assert not list(tmp_path.glob("state*"))
