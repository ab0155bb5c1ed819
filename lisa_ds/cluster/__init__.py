"""Many hosts: who a rank is, whether the hosts fit together, and what happens when the scheduler wants them back."""
