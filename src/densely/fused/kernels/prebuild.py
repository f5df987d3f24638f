"""Build the libraries that a wheel carries: `python -m densely.fused.kernels.prebuild`."""

import shutil

from densely.fused.kernels.build import LEVELS, PREBUILT, build, file_name


def main() -> None:
    """One library for each level of x86-64, in place of what was there."""
    shutil.rmtree(PREBUILT, ignore_errors=True)
    for level in LEVELS:
        path = PREBUILT / file_name(level)
        build(path, [f"-march={level}", "-mtune=generic"])
        print(f"built {path.name}")


if __name__ == "__main__":
    main()
