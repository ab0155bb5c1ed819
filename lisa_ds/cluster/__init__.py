"""Many hosts: a process's rank, checks that hosts fit together, ranks that hang, and preemption by the scheduler."""
