"""python -m tca_gguf"""

from tca_gguf.cli import main

if __name__ == "__main__":
    main()
