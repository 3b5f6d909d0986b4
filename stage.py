"""What every stage does with its machine, its processes and its run directory; nothing of the method.

A stage ends with launch(main, args, prepare). It calls prepare(args) once, and then main(rank, device, args,
*prepared) in this process, in each process of torchrun, or in --nprocs new processes. What a user or a
machine does wrong ends in one line on standard error and a status that is not zero.
"""
import argparse
import collections
import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import multiprocessing.resource_tracker
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ENDINGS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".ppm", b".pgm")
LOCK = "insloc.lock"                        # a folder that holds this file is a run directory
LOCAL = {"data", "out", "resume", "device", "nprocs", "workers"}    # these may differ between machines
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON = "--resume goes on from the last checkpoint"


class Parser(argparse.ArgumentParser):
    """argparse's parser with refusals of one line; the usage is left to --help."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Refusal(Exception):
    """What the user or the machine did wrong, in one line that says what to do: `launch` prints it, status 1."""


def fail(message):
    """Ends this process with one line and status 1."""
    message = f"{os.path.basename(sys.argv[0])}: error: {message}"
    if dist.is_initialized():               # at once: else the others miss it, and are heard of first
        print(message, file=sys.stderr, flush=True)
        kill_workers()
        os._exit(1)
    sys.exit(message)


def say(*words):
    """print, once for all processes: on rank 0."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(*words, flush=True)


def kill_workers():
    """Ends this process's loader workers, which as orphans might wait for ever.

    A signal may come when one is just forked, and multiprocessing does not know it yet; /proc does. It has
    this process's command line, unlike what a shell started before it became this process.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)                   # else torch reports them as failed
    for worker in mp.active_children():
        worker.kill()
    with contextlib.suppress(OSError):                              # a kernel without that list
        for pid in Path("/proc/thread-self/children").read_text().split():
            if Path(f"/proc/{pid}/cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


def leave(message, status=1):
    """Ends a run that all ranks leave in the same step. Rank 0 says why; status 1 is an error."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        program = f"{os.path.basename(sys.argv[0])}: error: " if status == 1 else ""
        print(program + message, file=sys.stderr, flush=True)
    gather_objects(None)                    # a launcher kills the others as soon as one has left
    sys.exit(status)


def last_line(error):
    """What happened, out of an exception; a loader worker puts its traceback in front."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].split("Unreadable: ")[-1]


# ---- Arguments -------------------------------------------------------------------------------------------

def add_machine_arguments(parser, out):
    """--device, --nprocs, --workers, --seed, --out, --resume. `out` describes the default of --out."""
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[ours: a GPU if there is one]")
    add("--nprocs", type=int, help="processes to start, none under torchrun [ours: one a GPU, or one]")
    add("--workers", type=int, help="loader workers a process [ours: its share of the cores, at most 8]")
    add("--seed", type=int, default=0, help="[ours: 0]")
    add("--out", help=f"run directory [ours: {out}]")
    add("--resume", action="store_true", help="go on with the run in --out, or start it [ours: off]")


def launcher_variables():
    """{name: int} of torchrun's variables, {} without a launcher. Refuses what is empty or no number."""
    found = {}
    if "RANK" in os.environ:
        defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}             # one process a machine
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            text = os.environ.get(name, defaults.get(name, ""))
            if not text.isdecimal():
                fail(f"RANK is set, but {name} is {text!r}, no number: start by torchrun, or unset RANK")
            found[name] = int(text)
        if not os.environ.get("MASTER_ADDR"):
            fail("RANK is set, but not MASTER_ADDR: start by torchrun, or unset RANK")
        if found["RANK"] >= found["WORLD_SIZE"]:
            fail(f"RANK {found['RANK']} is not below WORLD_SIZE {found['WORLD_SIZE']}: start by torchrun")
    return found


def check_machine_arguments(parser, args):
    """Fills in device, nprocs (processes of this machine), world (of the run), workers. Refuses by a line."""
    gpus, variables = torch.cuda.device_count(), launcher_variables()
    if args.device == "auto":
        args.device = "cuda" if gpus else "cpu"
    if args.device == "cuda" and not gpus:
        parser.error("--device cuda: torch sees no GPU; take --device cpu, or install driver and CUDA torch")
    if args.nprocs is None:
        args.nprocs = gpus if args.device == "cuda" else 1
    args.nprocs = variables.get("LOCAL_WORLD_SIZE", args.nprocs)
    args.world = variables.get("WORLD_SIZE", args.nprocs)
    if args.nprocs < 1 or args.world < 1:
        parser.error("--nprocs must be at least 1")
    if args.device == "cuda" and args.nprocs > gpus:
        parser.error(f"{args.nprocs} processes need as many GPUs, there are {gpus}: --nprocs {gpus}")
    if args.workers is None:                        # on the CPU the network itself needs the cores
        cores = len(os.sched_getaffinity(0)) // args.nprocs
        args.workers = max(1, min(8, cores - (args.device == "cpu")))
    if args.workers < 0 or not 0 <= args.seed < 2 ** 63:
        parser.error("--workers and --seed must be from 0 on, --seed below 2**63")


# ---- Processes -------------------------------------------------------------------------------------------

def launch(main, args, prepare):
    """See the top of this file. main and what prepare returns are pickled where processes are started."""
    try:
        os.makedirs(args.out, exist_ok=True)
        variables = launcher_variables()
        job = (main, args, prepare(args))
        if variables or args.nprocs == 1:
            run(variables.get("RANK", 0), "env://", *job)
        else:
            start_processes(args.nprocs, job)
    except (Refusal, OSError) as error:             # OSError: of --out or the data
        fail(error)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def start_processes(count, job):
    """`run` in `count` new processes, to which signals are handed on. Ends as they end."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)    # it logs each SIGTERM
    with tempfile.TemporaryDirectory() as folder:
        job = (f"file://{folder}/rendezvous", *job)
        multiprocessing.resource_tracker.ensure_running()           # else its start unblocks them again
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)           # they wait until `run` can answer them
        context = mp.start_processes(run, job, count, join=False, start_method="spawn")

        def hand_on(number, frame):
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, number)

        for number in SIGNALS:
            signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            while not context.join(grace_period=10):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            # When one process is killed, the others fail for want of it and may be noticed first.
            codes = [process.exitcode or 0 for process in context.processes]
            killed = [-code for code in codes if code < 0 and code != -signal.SIGTERM]
            if killed:
                fail(f"a process was ended by {signal.Signals(killed[0]).name}; {GO_ON}")
            if isinstance(error, mp.ProcessRaisedException):
                raise                               # a fault of the program: its traceback is needed
            sys.exit(max(error.exit_code, 1))       # that process has said why


def run(rank, rendezvous, main, args, prepared):
    """main in this process, with its device, the lock on --out and the process group."""
    def stop(number, frame):                # until a stage takes the signals itself, to save first
        if not next(first, False):          # Ctrl-C reaches all processes, and start_processes hands it on
            return
        if rank == 0 and os.getpid() == process:                    # a loader worker inherits this
            print(f"stopped by {signal.Signals(number).name}; {GO_ON}", file=sys.stderr, flush=True)
        kill_workers()
        os._exit(128 + number)

    first = iter([True])                    # next() tests and changes in one step that no signal can divide
    process = os.getpid()
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        device = torch.device("cpu")
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        elif args.nprocs > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.nprocs))
        lock = take_lock(args.out) if rank == 0 else None           # noqa: F841  held while the name lives
        if args.world > 1:
            backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"     # CPU tensors await no GPU
            try:
                dist.init_process_group(backend, rendezvous, rank=rank, world_size=args.world,
                                        timeout=datetime.timedelta(minutes=30))     # [detectron2]
            except (RuntimeError, ValueError) as error:
                fail(f"process {rank} does not meet the others: {last_line(error)[:150]}; check MASTER_ADDR, "
                     "MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")
        main(rank, device, args, *prepared)
    except Refusal as refusal:
        fail(refusal)
    except (MemoryError, ConnectionResetError, RuntimeError) as error:  # torch has no classes of its own
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            fail(f"out of memory: take a smaller group, batch, queue or image size ({last_line(error)[:90]})")
        if isinstance(error, ConnectionResetError) or "DataLoader worker" in str(error):
            fail(f"a DataLoader worker is gone: {last_line(error)[:150]}; if memory or /dev/shm is short, "
                 f"take fewer --workers or 0, or docker's --shm-size; {GO_ON}")
        raise
    except (OSError, FloatingPointError) as error:
        fail(f"{last_line(error)}; {GO_ON}")        # a loader worker's comes with its traceback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        kill_workers()
        if dist.is_initialized():
            dist.destroy_process_group()


def gather_objects(value):
    """[value of rank 0, value of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- Run directory ---------------------------------------------------------------------------------------

def take_lock(out):
    """The open lock file of a run directory. Refuses a directory that another process works in."""
    lock = open(os.path.join(out, LOCK), "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)            # loader workers do not inherit it
    except BlockingIOError:
        fail(f"another process works in {out}: give another --out, or start one run's processes by torchrun")
    return lock


def check_new(args, names):
    """Refuses an --out that holds one of the files `names`, unless --resume is given."""
    if not args.resume and any(os.path.exists(os.path.join(args.out, name)) for name in names):
        fail(f"{args.out} holds a run: --resume goes on with it, --out starts another")


def write_atomically(path, write, previous=None):
    """write(file) beside `path`, then renamed: a kill or a full disk loses nothing. The old: `previous`."""
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")                                # a full disk needs the room
        raise
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(path + ".tmp", path)


def checked(value):
    """A nested state with its tensors on the CPU. FloatingPointError if one is not finite."""
    if isinstance(value, dict):
        return {name: checked(part) for name, part in value.items()}
    if isinstance(value, list):
        return [checked(part) for part in value]
    if isinstance(value, torch.Tensor):
        value = value.cpu()
        if not value.isfinite().all():
            raise FloatingPointError("weights or keys are not finite: lower --lr, or try --precision fp32")
    return value


def save_checkpoint(out, state):
    """Writes checkpoint.pth, returns it as `checked`. The one before becomes checkpoint_prev.pth.

    A full disk is an OSError, or torch.save's RuntimeError.
    """
    path = os.path.join(out, "checkpoint.pth")
    state = checked(state)
    write_atomically(path, lambda f: torch.save(state, f), os.path.join(out, "checkpoint_prev.pth"))
    return state


def read_checkpoint(out, say):
    """The newest checkpoint in `out` that can be read, on the CPU; None if there is none. Runs no code."""
    paths = [os.path.join(out, name) for name in ("checkpoint.pth", "checkpoint_prev.pth")]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:                  # torch.load compares no check sums
                if archive.testzip():
                    raise zipfile.BadZipFile("a check sum is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
            say(f"resuming from {path}")
            return state
        except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            say(f"{path} cannot be read: {last_line(error)[:80]}")
    if paths:
        fail(f"no readable checkpoint in {out}; another --out starts afresh")
    say(f"no checkpoint in {out} yet: starting at step 0")


def resume(args, settings, free, say):
    """The checkpoint that --resume goes on from, or None. Refuses one whose settings, but `free`, differ."""
    state = read_checkpoint(args.out, say) if args.resume else None
    if state and "settings" not in state:
        leave(f"{args.out}/checkpoint.pth is no checkpoint of {os.path.basename(sys.argv[0])}")
    if state and (differ := differences(state["settings"], settings, free)):
        leave(f"cannot resume {args.out} with other settings: {differ}")
    return state


def digest(strings):
    """Sixteen hex digits of a sequence of bytes objects."""
    return hashlib.sha256(b"\0".join(strings)).hexdigest()[:16]


def differences(then, now, free):
    """'lr was 0.02, is 0.1': where two dicts of settings differ, but for names in `free`; '' if nowhere."""
    names = sorted((then.keys() | now.keys()) - free)
    changed = [name for name in names if then.get(name) != now.get(name)]
    return "; ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in changed)


def check_ranks(settings):
    """All ranks leave if their settings differ, since they would wait for each other or mix two runs."""
    first, *others = gather_objects(settings)
    for other in others:
        if differ := differences(first, other, LOCAL):
            leave(f"the processes differ, give all the same command, data and --out: {differ}")


def commit():
    """The commit of this file, "unknown" outside of a checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:                                                 # no git
        return "unknown"


# ---- Images ----------------------------------------------------------------------------------------------

def find_images(folder, say=print):
    """Sorted paths (bytes, relative to `folder`) of the images at any depth.

    Links are followed, each folder once. Hidden folders and run directories hold no data. Other files are
    counted and said. A folder that cannot be listed is refused.
    """
    def refuse(error):
        fail(f"{os.fsdecode(error.filename)}: {error.strerror}")

    found, seen, others = [], set(), collections.Counter()
    for where, subfolders, files in os.walk(os.fsencode(folder), onerror=refuse, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen or os.fsencode(LOCK) in files:
            subfolders.clear()                                      # a link that leads back up, a run of ours
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = [name for name in subfolders if not name.startswith(b".")]
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if ending in ENDINGS and not name.startswith(b"."):
                found.append(os.path.relpath(os.path.join(where, name), os.fsencode(folder)))
            else:
                others[os.fsdecode(ending)] += 1
    if others:
        kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in others.most_common(5))
        say(f"{folder}: {others.total()} files left out, which are no images: {kinds}")
    return sorted(found)


# ---- Probes ----------------------------------------------------------------------------------------------

def start_probe(args, nets, images, progress=None):
    """The settings of a probe's run and the checkpoint that it goes on from, or None.

    nets: its frozen networks; images: a digest of its images; progress: the checkpoint's list that grows, or
    None if the probe keeps no checkpoint. All processes leave if theirs differ.
    """
    settings = {**vars(args), "images": images, "nets": digest_of(nets)}
    free = LOCAL | {"world", "weights", "trust", "boxes"}           # the digests stand for these
    state = resume(args, settings, free, say) if progress else None
    check_ranks({**settings, "done": len(state[progress]) if state else 0})
    return settings, state


def find_splits(args):
    """DATA -> the paths of the images of train, of val, at any depth; a digest of their names."""
    check_new(args, ("checkpoint.pth", "checkpoint_prev.pth", "results.json"))
    paths, all_names = [], []
    for split in ("train", "val"):
        folder = os.path.join(args.data, split)
        names = find_images(folder)
        if len(names) <= max(3, args.world):
            raise Refusal(f"{folder} has {len(names)} images; needed are four, and more than processes")
        paths.append([os.path.join(folder, os.fsdecode(name)) for name in names])
        all_names += [split.encode(), *names]
    return *paths, digest(all_names)


def digest_of(nets):
    """Sixteen hex digits of all tensors of a network, bit for bit."""
    return digest(tensor.cpu().numpy().tobytes() for tensor in nets.state_dict().values())


def write_results(args, settings, nets, results):
    """Writes the dict `results` and a probe's settings to results.json, if its networks are still the same."""
    if digest_of(nets) != settings["nets"]:
        raise Refusal("a frozen net has changed: the results are void")
    if not dist.is_initialized() or dist.get_rank() == 0:
        text = json.dumps({**results, "settings": settings, "commit": commit()}, indent=1)
        write_atomically(os.path.join(args.out, "results.json"), lambda f: f.write(text.encode()))
