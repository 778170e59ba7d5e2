from headrace_producer.cli import main

main()
