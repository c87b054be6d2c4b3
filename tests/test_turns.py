"""Tests that measure time run alone, where processes share the tests."""

import threading

import turns


def test_who_wants_to_be_alone_waits_and_is_waited_for(tmp_path, monkeypatch):
    for name in ("DOOR", "ROOM"):
        monkeypatch.setattr(turns, name, tmp_path / name)
        (tmp_path / name).touch()
    said, leave, inside = [], {name: threading.Event() for name in "ab"}, threading.Event()

    def take(name, alone=False):
        with turns.turn(alone):
            said.append(name)
            inside.set()
            leave[name].wait(10) if name in leave else None

    def start(name, alone=False):
        thread = threading.Thread(target=take, args=(name, alone))
        thread.start()
        return thread

    threads = [start("a")]
    assert inside.wait(10)
    threads.append(start("b", alone=True))
    threads[1].join(0.2)
    threads.append(start("c"))
    threads[2].join(0.2)
    assert said == ["a"], "one who is alone waits, and nobody slips past"
    leave["a"].set()
    threads[0].join(10)
    threads[2].join(0.2)
    assert said == ["a", "b"], "while one is alone the others wait"
    leave["b"].set()
    for thread in threads:
        thread.join(10)
    assert said == ["a", "b", "c"]
