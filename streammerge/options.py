"""Options that several verbs have."""

from __future__ import annotations

import click

memory_option = click.option(
    "--memory", metavar="SIZE", help="Memory budget of each process, such as 4GiB. Default: half of what is available."
)
shard_option = click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Size of output files. Default: 5GB, or what a report given as recipe says.",
)
device_option = click.option(
    "--device", default="cpu", metavar="NAME", help="Where to compute: cpu, cuda or cuda:N. Default: cpu."
)
device_memory_option = click.option(
    "--device-memory", metavar="SIZE", help="Budget on that device. Default: 80 % of what is free there."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
consumed_option = click.option(
    "--delete-consumed",
    is_flag=True,
    help="Delete each file that was fetched when all of it is merged; never one that was there before.",
)
