"""What a program will cost, from its compiled form: operations, memory, traffic."""
