from .overhead.cli import main

main()
