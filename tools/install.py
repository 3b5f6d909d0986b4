"""Makes the virtual environment of `make install`, or adds packages to it.

    python3.12 tools/install.py .venv
    python3.12 tools/install.py .venv ruff==0.14.0

Of this machine's settings for pip only those count that say where packages come from (SOURCES). Neither a
target folder, --user and PYTHONPATH nor a torch that the machine has decides what is in the environment.
"""
import ast
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
NEWEST = (3, 13)                            # of those that were tried
SOURCES = ("index-url", "extra-index-url", "no-index", "find-links", "trusted-host", "cert", "client-cert",
           "proxy", "timeout", "default-timeout", "retries", "keyring-provider", "cache-dir", "no-cache-dir")
# detectron2's Python sources at upstream a59f0563, compared file by file (docs/running.md says what differs).
# Nothing that R-CNN training and COCO/VOC evaluation use is compiled. The wheel is tagged cp310, hence
# --python-version; the hash pins its bytes.
DETECTRON2 = ("sal-detectron2==0.7.2 "
              "--hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561\n")
NEEDED = "import torch, torchvision, pycocotools, pytest, safetensors, matplotlib, tensorboard"


def check_python(version):
    """Whether this Python was tried. Refuses one that is too old."""
    name = f"{version[0]}.{version[1]}"
    if version[:2] < OLDEST:
        sys.exit(f"install.py: error: Python 3.11 to 3.13 is needed, this is {name}: name another one, such "
                 "as make install PYTHON=python3.12")
    if version[:2] > NEWEST:
        print(f"NOTE: this was never run on Python {name}, only on 3.11, 3.12 and 3.13.")
    return version[:2] <= NEWEST


def variable(key):
    return "PIP_" + key.upper().replace("-", "_")


def pip_environment(python, environ):
    """The variables with which the pip of `python` knows the settings of SOURCES and no others.

    Constraints count where a file of pip's sets them: there they say what an index has. In a variable they
    pin what an image has installed for its own Python, its torch first.
    """
    clean = {name: value for name, value in environ.items()
             if not name.startswith("PIP_") and name not in ("PYTHONPATH", "PYTHONHOME")}
    asked = dict(clean)
    for name in ("PIP_CONFIG_FILE", *map(variable, SOURCES)):
        if name in environ:
            asked[name] = environ[name]
    listed = subprocess.run([python, "-I", "-m", "pip", "config", "list"], env=asked, stdout=subprocess.PIPE,
                            text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():                 # global.index-url='https://...'
        place, _, value = line.partition("=")
        section, _, key = place.rpartition(".")
        settings[section, key] = " ".join(ast.literal_eval(value).split())
    for section in ("global", "install", ":env:"):          # the later one wins, as in pip
        for key in (*SOURCES, "constraint"):
            if settings.get((section, key)):
                clean[variable(key)] = settings[section, key]
    return {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def pip_install(python, environment, *arguments):
    subprocess.run([python, "-I", "-m", "pip", "install", "-q", *arguments], env=environment, check=True)


def make_venv(folder):
    """Makes it, or keeps one of the same Python. Returns its interpreter."""
    python = os.path.join(folder, "bin", "python")
    options = []
    if os.path.exists(python):
        code = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        if subprocess.run([python, "-I", "-c", code]).returncode:
            options = ["--clear"]
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    return python


def check_imports(python, environment, tried):
    """Imports what the stages import. On a Python that was not tried, detectron2 may be missing."""
    subprocess.run([python, "-I", "-c", NEEDED], env=environment, check=True)
    found = subprocess.run([python, "-I", "-c", "import detectron2.engine"], env=environment,
                           stderr=subprocess.PIPE, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        text = f"detectron2 cannot be imported ({reason}): stage 3, finetune_det.py, is missing"
        if tried:
            sys.exit(f"install.py: error: {text}")
        print(f"NOTE: {text}; stages 1 and 2 need nothing of it.")


def make_environment(folder):
    """Installs all that requirements.txt names, then detectron2."""
    tried = check_python(sys.version_info)
    print(f"Installing torch, torchvision, detectron2 and what they need into {folder}, for Python "
          f"{sys.version_info[0]}.{sys.version_info[1]}.\nThis downloads 3.1 GB and takes 5.7 GB of disk. It "
          "takes minutes, as network, disk and processor are; nothing is printed meanwhile.", flush=True)
    began = time.time()
    python = make_venv(folder)
    environment = pip_environment(python, os.environ)
    pip_install(python, environment, "-r", os.path.join(HERE, "requirements.txt"))

    pinned = os.path.join(folder, "detectron2.txt")
    with open(pinned, "w") as f:
        f.write(DETECTRON2)
    where = subprocess.run([python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           stdout=subprocess.PIPE, text=True, check=True)
    pip_install(python, environment, "--require-hashes", "--no-deps", "--only-binary=:all:", "--upgrade",
                "--python-version", "3.10", "--target", where.stdout.strip(), "-r", pinned)
    check_imports(python, environment, tried)
    print(f"Installed {folder} in {time.time() - began:.0f} seconds.")


def main(folder, *packages):
    if packages:
        python = os.path.join(folder, "bin", "python")
        pip_install(python, pip_environment(python, os.environ), *packages)
    else:
        make_environment(folder)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as failed:
        sys.exit(f"install.py: error: this command did not work, see above: {' '.join(failed.cmd)}")
