"""``python -m senticlip`` is ``senticlip``; ``torchrun -m senticlip`` trains with many processes."""

from senticlip.cli import main

main()
