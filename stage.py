"""What every stage does with its machine, its processes and its run directory; nothing of the method.

A stage ends with launch(main, args, prepare). It calls prepare(args) once, and then main(rank, device, args,
*prepared) in this process, in each process of torchrun, or in --nprocs new processes.

Errors are of three kinds. What the user or the machine did wrong is found by a check and raised as a Refusal.
What the world does (files, disks, memory, loader workers, other processes, a GPU) is caught around the call
that touches it and raised as a Refusal, too: one line on standard error, status 1. Anything else is a bug,
which nobody catches: it keeps its traceback, and a debugger stops at its line.
"""
import argparse
import collections
import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import json
import logging
import multiprocessing.queues
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ENDINGS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".ppm", b".pgm")
LOCK = "insloc.lock"                        # a folder that holds this file is a run directory
LOCAL = {"data", "out", "resume", "device", "nprocs", "workers"}    # these may differ between machines
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)    # each is a request to stop
PR_SET_PDEATHSIG = 1                        # Linux's prctl: "send me this signal when my parent ends"


class Parser(argparse.ArgumentParser):
    """argparse's parser with refusals of one line; the usage is left to --help."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Refusal(Exception):
    """What is wrong outside of the program, in one line that also says what to do.

    Any rank may raise it at any time: its process ends at once, and the others with it. Where all ranks know
    in the same step that they must leave, `leave` lets them do so in order.
    """


def leave(message, status=1):
    """Ends a run that all ranks leave in the same step. Rank 0 says why; status 1 is an error."""
    program = f"{os.path.basename(sys.argv[0])}: error: " if status == 1 else ""
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_line(program + message, sys.stderr)
    gather_objects(None)                    # a launcher kills the others as soon as one has left
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def end(refusal):
    """Ends this process with the line of a Refusal and status 1."""
    line = f"{os.path.basename(sys.argv[0])}: error: {refusal}"
    if dist.is_initialized():               # at once: else the others miss it, and are heard of first
        write_line(line, sys.stderr)
        end_workers()
        os._exit(1)
    sys.exit(line)


def say(line):
    """print, once for all processes: on rank 0."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        write_line(line, sys.stdout)


def write_line(line, stream):
    """print at once. If the stream takes no more, this process gets SIGHUP, as from a closed terminal."""
    try:
        print(line, file=stream, flush=True)
    except OSError as error:                # gone is the terminal, what reads the pipe, or the disk's space
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())          # later lines go nowhere
        with contextlib.suppress(OSError):
            print(f"{stream.name}: {error.strerror}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGHUP)


def attempt(what, function, *given):
    """function(*given), for what is not worth a run, such as a picture: if it fails, a line says so."""
    try:
        return function(*given)
    except Exception as error:              # any: it is another library's, on another machine
        say(f"no {what}: {type(error).__name__}: {last_line(error)[:150]}; the run goes on")


@contextlib.contextmanager
def touching(place):
    """What the file system refuses inside is a Refusal that names the place."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"{place}: {error.strerror or error}") from error


def first_line(error):
    """What happened, out of an exception of torch, which puts its advice below."""
    return str(error).strip().partition("\n")[0][:200]


def last_line(error):
    """What happened, out of an exception; out of a loader worker it comes behind the worker's traceback."""
    name = type(error).__name__
    return str(error).strip().rpartition("\n")[2].rpartition(f"{name}: ")[2] or name


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
        given = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **os.environ}  # default: one process a machine
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            text = given.get(name, "")
            if not text.isdecimal():
                raise Refusal(f"RANK is set, but {name} is {text!r}, no number: start by torchrun, or unset "
                              "RANK")
            found[name] = int(text)
        if found["RANK"] >= found["WORLD_SIZE"]:                    # it would wait for the others for ever
            raise Refusal(f"RANK {found['RANK']} is not below WORLD_SIZE {found['WORLD_SIZE']}")
    return found


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):            # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_machine_arguments(parser, args):
    """Fills in device, nprocs (processes of this machine), world (of the run), workers. Refuses by a line."""
    gpus = torch.cuda.device_count()
    if args.device == "auto":
        args.device = "cuda" if gpus else "cpu"
    if args.device == "cuda" and not gpus:
        parser.error("--device cuda: torch sees no GPU; take --device cpu, or install driver and CUDA torch")
    try:
        variables = launcher_variables()
        if args.device == "cuda":
            check_gpu()
    except Refusal as refusal:
        parser.error(refusal)
    if args.nprocs is None:
        args.nprocs = gpus if args.device == "cuda" else 1
    args.nprocs = variables.get("LOCAL_WORLD_SIZE", args.nprocs)
    args.world = variables.get("WORLD_SIZE", args.nprocs)
    if args.nprocs < 1 or args.world < 1:
        parser.error("--nprocs must be at least 1")
    if args.device == "cuda" and args.nprocs > gpus:
        parser.error(f"{args.nprocs} processes need as many GPUs, there are {gpus}: --nprocs {gpus}")
    if args.workers is None:                        # on the CPU the network itself needs the cores
        share = cores() // args.nprocs
        args.workers = max(1, min(8, share - (args.device == "cpu")))
    if args.workers < 0 or not 0 <= args.seed < 2 ** 63:
        parser.error("--workers and --seed must be from 0 on, --seed below 2**63")


def check_gpu(device=None):
    """Refuses a GPU that is listed but does not work. Without a device, CUDA's start alone is tried."""
    try:
        torch.cuda.init()
        if device:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device).add(1).item()             # a kernel, and its answer
    except RuntimeError as error:                                   # torch has no class of its own for it
        raise Refusal(f"the GPU does not work: {first_line(error)}; --device cpu does without") from error


# ---- Processes -------------------------------------------------------------------------------------------

def launch(main, args, prepare):
    """See the top of this file. main and what prepare returns are pickled where processes are started."""
    created = False
    try:
        prepare_process()
        if "://" in args.out:
            raise Refusal(f"--out {args.out}: only a folder of this machine's file system can be written to")
        prepared = prepare(args)
        with touching(f"--out {args.out}"):
            created = not os.path.exists(args.out)
            os.makedirs(args.out, exist_ok=True)
        variables = launcher_variables()
        if variables or args.nprocs == 1:
            run(variables.get("RANK", 0), "env://", main, args, prepared)
        else:
            start_processes(args.nprocs, main, args, prepared)
    except Refusal as refusal:
        end(refusal)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        if created:
            remove_unused(args.out)


def prepare_process():
    """File names of any bytes can be printed, and loader workers' sockets have short names."""
    sys.stdout.reconfigure(errors="backslashreplace")
    with touching("TMPDIR"):
        # Workers hand tensors over through sockets in TMPDIR/pymp-XXXXXXXX, of 108 bytes at most (Mac: 104).
        if len(os.fsencode(tempfile.gettempdir())) > 70:
            tempfile.tempdir = "/tmp"


def start_processes(count, main, args, prepared):
    """`run` in `count` new processes, to which signals are handed on. Ends as the first that fails."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)    # it logs each SIGTERM
    with tempfile.TemporaryDirectory() as folder:
        job = (f"file://{folder}/rendezvous", main, args, prepared)
        multiprocessing.resource_tracker.ensure_running()           # its start would unblock the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)           # they wait until `run` can answer them
        context = mp.start_processes(run, job, count, join=False, start_method="spawn")

        def hand_on(number, frame):
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, number)

        for number in answered_signals():
            signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            while not context.join(grace_period=10):                # at a failure it ends the others, too
                pass
        except mp.ProcessExitedException as error:
            if error.signal_name:
                raise Refusal(f"a process was ended by {error.signal_name}{go_on(args.out)}") from None
            sys.exit(error.exit_code)                               # that process has said why


def run(rank, rendezvous, main, args, prepared):
    """main in this process, with its device, the lock on --out and the process group."""
    process = os.getpid()
    stopping = threading.Lock()             # taken by the first request; nothing can come between

    def stop(number, frame):                # until a stage takes the signals itself, to save first
        if not stopping.acquire(blocking=False):                    # Ctrl-C reaches all, and is handed on
            return
        if os.getpid() == process:                                  # a loader worker inherits this
            if rank == 0:
                name = signal.Signals(number).name
                write_line(f"stopped by {name}{go_on(args.out)}", sys.stderr)
            end_workers()
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in answered_signals()}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        prepare_process()
        device = torch.device("cpu")
        if args.device == "cuda":
            device = torch.device("cuda", launcher_variables().get("LOCAL_RANK", rank))
            check_gpu(device)
        elif args.nprocs > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // args.nprocs))
        lock = take_lock(args.out) if rank == 0 else None           # noqa: F841  held while the name lives
        if args.world > 1:
            meet(rank, rendezvous, args.world, args.device)
        main(rank, device, args, *prepared)
        if dist.is_initialized():
            dist.destroy_process_group()
    except Refusal as refusal:
        end(refusal)
    except (MemoryError, RuntimeError) as error:                    # torch has no class for the CPU's memory
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):
            if dist.is_initialized():       # the cause may be another process's end: it is heard of first,
                for number in before:       # and its launcher may end this one without a traceback
                    signal.signal(number, stop)
                time.sleep(1)
            raise
        end(f"out of memory: take a smaller group, batch, queue or image size ({last_line(error)[:90]})")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        end_workers()


def end_workers():
    """Ends loader workers at once; Python would wait for one that hangs. One just forked ends by itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)                   # else torch reports them as failed
    for worker in mp.active_children():
        worker.kill()


def meet(rank, rendezvous, world, device):
    """The process group of all ranks."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"              # CPU tensors await no GPU
    try:
        dist.init_process_group(backend, rendezvous, rank=rank, world_size=world,
                                timeout=datetime.timedelta(minutes=30))         # [detectron2]
    except (RuntimeError, ValueError) as error:
        raise Refusal(f"process {rank} does not meet the others: {last_line(error)[:150]}; check "
                      "MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME") from error


def gather_objects(value):
    """[value of rank 0, value of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def answered_signals():
    """SIGNALS, but for those that this process was started to ignore (nohup ignores SIGHUP)."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def collect_signals():
    """From now on a request to stop ends nothing, but is appended to the list that this returns."""
    signals = []
    for number in answered_signals():
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


# ---- Loader workers --------------------------------------------------------------------------------------

def load(dataset, batch_sampler, workers, collate=None, pin_memory=False, data_errors=()):
    """Yields the batches of a torch DataLoader whose workers end with this process.

    A Refusal, an exception of a class in `data_errors`, and whatever befalls a worker end in a Refusal. Any
    other exception of dataset or collate is a bug and comes through, a worker's with its traceback.
    """
    context = None
    if workers:                             # forked, they share torch and the paths, 420 MB each otherwise
        context = "fork" if sys.platform == "linux" else "spawn"
    loader = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batch_sampler, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=start_worker, multiprocessing_context=context))
    if workers:                             # torch's handler raises at whatever line runs when a worker dies
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from loader
    except (Refusal, *data_errors) as error:
        raise Refusal(last_line(error)) from error
    except (OSError, EOFError, RuntimeError) as error:
        if not workers or "in DataLoader worker process" in str(error):     # torch's words for a bug in one
            raise
        end_workers()
        with contextlib.suppress(OSError):          # Python removes it in the end, or complains
            os.makedirs(multiprocessing.util.get_temp_dir(), exist_ok=True)
        raise Refusal("a DataLoader worker was killed, or cannot hand over its data: if memory or /dev/shm "
                      "is short, take fewer --workers or 0, or docker's --shm-size; the folder TMPDIR must "
                      "last as long as the run") from error


def start_worker(_):
    """The worker_init_fn: a worker leaves requests to stop to its parent, and ends with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):                       # elsewhere torch looks every five seconds
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:        # it had ended before
        os._exit(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(cannot_hand_over)


def cannot_hand_over(error, _):
    """Ends a worker that cannot hand over a batch: its parent would wait for the batch for ever."""
    if not isinstance(error, (OSError, RuntimeError)):              # those are the machine's, others are bugs
        traceback.print_exception(error)
    os._exit(1)


# ---- Run directory ---------------------------------------------------------------------------------------

def remove_unused(out):
    """Removes a run directory into which nothing has been written but its lock."""
    with contextlib.suppress(OSError):
        if os.listdir(out) == [LOCK]:
            os.remove(os.path.join(out, LOCK))
        os.rmdir(out)                       # an OSError if it is not empty


def take_lock(out):
    """The open lock file of a run directory. Refuses a directory that another process works in."""
    with touching(f"--out {out}"):
        lock = open(os.path.join(out, LOCK), "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)            # loader workers do not inherit it
    except (BlockingIOError, PermissionError):
        raise Refusal(f"another process works in {out}: give another --out, or start one run's processes by "
                      "torchrun") from None
    except OSError as error:                # Lustre without flock, NFS without lockd
        say(f"note: no locks in {out} ({error.strerror}): nothing keeps a second run out of it")
    return lock


def check_new(args, names):
    """Refuses an --out that holds one of the files `names`, unless --resume is given."""
    if not args.resume and any(os.path.exists(os.path.join(args.out, name)) for name in names):
        raise Refusal(f"{args.out} holds a run: --resume goes on with it, --out starts another")


def go_on(out):
    """The end of a line about a run that stops: how it goes on, "" if there is no checkpoint."""
    ours = Path(out).glob("checkpoint*.pth")
    detectrons = Path(out).glob("*/last_checkpoint")
    return "; --resume goes on from the last checkpoint" if [*ours, *detectrons] else ""


def write_atomically(path, write, previous=None):
    """write(file) beside `path`, then renamed: a kill or a full disk loses nothing.

    previous: the name that the old file gets; None replaces it.
    """
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:                        # RuntimeError: torch.save, a full disk
        raise Refusal(f"{path} cannot be written: {last_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):                          # there after a failure alone
            os.remove(path + ".tmp")                                # a full disk needs the room


def checked(value):
    """A nested state with its tensors on the CPU. Refuses one that is not finite."""
    if isinstance(value, dict):
        return {name: checked(part) for name, part in value.items()}
    if isinstance(value, list):
        return list(map(checked, value))
    if isinstance(value, torch.Tensor):
        value = value.cpu()
        if not value.isfinite().all():
            raise Refusal("weights or keys are not finite: lower --lr, or try --precision fp32")
    return value


def save_checkpoint(out, state):
    """Writes checkpoint.pth, returns it as `checked`. The one before becomes checkpoint_prev.pth."""
    path = os.path.join(out, "checkpoint.pth")
    state = checked(state)
    write_atomically(path, lambda f: torch.save(state, f), os.path.join(out, "checkpoint_prev.pth"))
    return state


def read_checkpoint(out):
    """The newest checkpoint in `out` that can be read, on the CPU; None if there is none. Runs no code."""
    damaged = False
    for name in ("checkpoint.pth", "checkpoint_prev.pth"):
        path = os.path.join(out, name)
        if not os.path.exists(path):
            continue
        try:
            with zipfile.ZipFile(path) as archive:                  # torch.load compares no check sums
                if archive.testzip():
                    raise zipfile.BadZipFile("a check sum is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
            say(f"resuming from {path}")
            return state
        except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            say(f"{path} cannot be read: {last_line(error)[:80]}")
            damaged = True
    if damaged:
        raise Refusal(f"no readable checkpoint in {out}; another --out starts afresh")
    say(f"no checkpoint in {out} yet: starting at step 0")


def resume(args, settings, free, advice="another --out starts afresh"):
    """The checkpoint that --resume goes on from, or None. Refuses one whose settings, but `free`, differ."""
    state = read_checkpoint(args.out) if args.resume else None
    fault = ""
    if state and "settings" not in state:
        fault = f"{args.out}/checkpoint.pth is no checkpoint of {os.path.basename(sys.argv[0])}"
    elif state and (differ := differences(state["settings"], settings, free)):
        fault = f"cannot resume {args.out} with other settings: {differ}; {advice}"
    fault = max(gather_objects(fault))      # one rank's is all ranks'; "" is the smallest
    if fault:
        leave(fault)
    return state


def digest(strings):
    """Sixteen hex digits of a sequence of bytes objects."""
    return hashlib.sha256(b"\0".join(strings)).hexdigest()[:16]


def differences(then, now, free):
    """'lr was 0.02, is 0.1': where two dicts of settings differ, but for names in `free`; '' if nowhere."""
    found = []
    for name in sorted((then.keys() | now.keys()) - free):
        if then.get(name) != now.get(name):
            found.append(f"{name} was {then.get(name)}, is {now.get(name)}")
    return "; ".join(found)


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

def find_images(folder):
    """Sorted paths (bytes, relative to `folder`) of the images at any depth.

    Links are followed, each folder once. Hidden folders and run directories hold no data. Other files are
    counted and said. A folder that cannot be listed is refused.
    """
    def refuse(error):
        raise Refusal(f"{os.fsdecode(error.filename)}: {error.strerror}") from error

    found = []
    seen = set()
    others = collections.Counter()
    root = os.fsencode(folder)
    for where, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        place = os.path.realpath(where)
        if place in seen or os.fsencode(LOCK) in files:
            subfolders.clear()                                      # a link that leads back up, a run of ours
            continue
        seen.add(place)
        subfolders[:] = [name for name in subfolders if not name.startswith(b".")]
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if ending in ENDINGS and not name.startswith(b"."):
                found.append(os.path.relpath(os.path.join(where, name), root))
            else:
                others[os.fsdecode(ending)] += 1
    if others:
        kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in others.most_common(5))
        say(f"{folder}: {others.total()} files left out, hidden or of endings that are not read: {kinds}")
    return sorted(found)


# ---- Probes ----------------------------------------------------------------------------------------------

def start_probe(args, nets, images, progress=None):
    """The settings of a probe's run and the checkpoint that it goes on from, or None.

    nets: its frozen networks; images: a digest of its images; progress: the checkpoint's list that grows, or
    None if the probe keeps no checkpoint. All processes leave if theirs differ.
    """
    settings = {**vars(args), "images": images, "nets": digest_of(nets)}
    free = LOCAL | {"world", "weights", "trust", "boxes"}           # the digests stand for these
    state = resume(args, settings, free) if progress else None
    check_ranks({**settings, "done": len(state[progress]) if state else 0})
    return settings, state


def find_splits(args):
    """DATA -> the paths of the images of train, of val, at any depth; a digest of their names."""
    check_new(args, ("checkpoint.pth", "checkpoint_prev.pth", "results.json"))
    paths = []
    all_names = []
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
    """Writes `results`, a dict, and a probe's settings to results.json, if its nets are still the same."""
    if digest_of(nets) != settings["nets"]:
        raise Refusal("a frozen net has changed: the results are void")
    if not dist.is_initialized() or dist.get_rank() == 0:
        text = json.dumps({**results, "settings": settings, "commit": commit()}, indent=1)
        write_atomically(os.path.join(args.out, "results.json"), lambda f: f.write(text.encode()))
