"""`python -m flows.cli` is `svd`: for launchers that start Python with a module, such as torchrun."""

from flows.cli.entry import main

if __name__ == "__main__":
    main()
