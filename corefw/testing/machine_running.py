"""The contract kit for machines: facts about the machine, starting and stopping, and moving."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import numpy as np

from corefw.errors import MigfwError
from corefw.machine import Machine, RunState, ThrottlableMachine, VerifiableMachine
from corefw.testing.machine_bench import Bench, assert_state, check, load_devices, save_devices

# -- what it is --------------------------------------------------------------------------------------------------------


@check
def _a_new_machine_says_what_it_is(bench: Bench) -> None:
    """A new machine has a kind, a name, the right run state, and information() as JSON with the RAM by block."""
    for incoming, expected in ((False, RunState.PRELAUNCH), (True, RunState.INMIGRATE)):
        machine = bench.machine(incoming=incoming)
        assert machine.run_state is expected, (
            f"a machine with incoming={incoming} is {machine.run_state}, not {expected}"
        )
        assert machine.kind, "its kind is empty"
        assert 0 < len(machine.name.encode()) < 256, f"its name '{machine.name}' has not 1 to 255 bytes"
        information = json.loads(json.dumps(dict(machine.information())))
        sizes = {block.idstr: block.length for block in machine.ram_blocks()}
        assert information.get("ram") == sizes, f"information()['ram'] is {information.get('ram')}, not {sizes}"


@check
def _two_machines_fit_each_other(bench: Bench) -> None:
    """Both sides have the same name, blocks and devices."""
    here, there = bench.machine(), bench.machine(incoming=True)
    assert here.name == there.name, f"the source is '{here.name}', the destination '{there.name}'"
    for what, describe in (("RAM blocks", _block_sizes), ("devices", _device_names)):
        left, right = describe(here), describe(there)
        assert left == right, f"the source has the {what} {left}, the destination {right}"
        assert len(dict(left)) == len(left), f"two {what} have one name: {left}"


def _block_sizes(machine: Machine) -> list[tuple[object, int]]:
    return [(block.idstr, block.length) for block in machine.ram_blocks()]


def _device_names(machine: Machine) -> list[tuple[object, int]]:
    return [((device.name, device.instance_id), device.vmstate.version_id) for device in machine.devices()]


# -- start and stop ----------------------------------------------------------------------------------------------------


@check
def _start_and_stop_can_be_repeated(bench: Bench) -> None:
    """start() and stop() can be called twice, stop() enters the given state, and a stopped guest starts again."""
    machine = bench.machine()
    for _ in range(2):
        machine.start()
        machine.start()
        assert_state(machine, RunState.RUNNING, "start()")
        bench.wait()
        machine.stop(RunState.PAUSED)
        assert_state(machine, RunState.PAUSED, "stop(PAUSED)")
        machine.stop(RunState.FINISH_MIGRATE)
        assert_state(machine, RunState.FINISH_MIGRATE, "stop(FINISH_MIGRATE) of a stopped guest")
    machine.set_run_state(RunState.POSTMIGRATE)
    assert_state(machine, RunState.POSTMIGRATE, "set_run_state(POSTMIGRATE)")
    machine.start()
    assert_state(machine, RunState.RUNNING, "start() after a migration")


@check
def _nothing_changes_while_stopped(bench: Bench) -> None:
    """Neither RAM nor devices change after stop() has returned."""
    machine = bench.running()
    machine.stop(RunState.PAUSED)
    ram, devices = [block.pages.copy() for block in machine.ram_blocks()], save_devices(machine)
    bench.wait()
    bench.wait()
    for block, copy in zip(machine.ram_blocks(), ram, strict=True):
        assert np.array_equal(block.pages, copy), f"block '{block.idstr}' changed while the guest was stopped"
    assert save_devices(machine) == devices, "a device's state changed while the guest was stopped"


@check
def _observers_hear_every_change_once(bench: Bench) -> None:
    """Observers are called with (old, new) after each change of run state, and only then."""
    machine = bench.machine()
    heard: list[tuple[RunState, RunState]] = []
    in_force: list[bool] = []

    def observer(old: RunState, new: RunState) -> None:
        heard.append((old, new))
        in_force.append(machine.run_state is new)

    machine.watch(observer)
    machine.start()
    machine.start()
    machine.stop(RunState.FINISH_MIGRATE)
    machine.stop(RunState.FINISH_MIGRATE)
    machine.set_run_state(RunState.POSTMIGRATE)
    states = [RunState.PRELAUNCH, RunState.RUNNING, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE]
    expected = list(itertools.pairwise(states))
    assert heard == expected, f"observers heard {_listed(heard)}, expected {_listed(expected)}"
    assert all(in_force), "an observer was called before run_state had changed"


def _listed(changes: Sequence[tuple[RunState, RunState]]) -> str:
    return ", ".join(f"{old} -> {new}" for old, new in changes) or "nothing"


# -- the move ----------------------------------------------------------------------------------------------------------


@check
def _state_moves_to_another_machine(bench: Bench) -> None:
    """RAM and devices of a stopped guest load into an incoming machine, which saves the same bytes and then starts."""
    source, destination = bench.running(), bench.machine(incoming=True)
    source.stop(RunState.FINISH_MIGRATE)
    blocks = {block.idstr: block for block in destination.ram_blocks()}
    for block in source.ram_blocks():
        data = block.pages.copy()
        blocks[block.idstr].store(np.arange(len(data)), data)
    saved = save_devices(source)
    load_devices(destination, saved)
    assert save_devices(destination) == saved, "a device that was loaded does not save what was loaded"
    destination.start()
    bench.wait()
    assert_state(destination, RunState.RUNNING, "start() on the destination")
    destination.stop(RunState.PAUSED)
    if isinstance(destination, VerifiableMachine):
        destination.verify()
    source.set_run_state(RunState.POSTMIGRATE)
    source.start()
    assert_state(source, RunState.RUNNING, "start() on the source, whose migration was called off")


# -- what only some can ------------------------------------------------------------------------------------------------


@check
def _throttle_can_be_ended(bench: Bench) -> None:
    """A throttled guest still stops, and throttle(0) ends the throttling."""
    machine = bench.running()
    if not isinstance(machine, ThrottlableMachine):
        return
    machine.throttle(99)
    bench.wait()
    machine.stop(RunState.PAUSED)
    machine.throttle(0)
    machine.start()
    assert_state(machine, RunState.RUNNING, "start() after throttle(0)")


# -- the end -----------------------------------------------------------------------------------------------------------


@check
def _close_can_be_repeated(bench: Bench) -> None:
    """close() works in any state, and twice; afterwards start() raises a MigfwError and does not hang."""
    for machine in (bench.machine(), bench.machine(incoming=True), bench.running()):
        machine.close()
        machine.close()
        try:
            machine.start()
        except MigfwError:
            continue
        raise AssertionError(f"start() after close() raised nothing; the machine is {machine.run_state}")
