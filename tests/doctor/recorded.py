"""What `nvidia-smi -q -x` prints, with the elements of driver 535 and later (nvsmi_device_v12.dtd), as far as the doctor reads it."""

from __future__ import annotations

from collections.abc import Mapping

_HEAD = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
	<timestamp>Mon Nov 23 08:15:02 2026</timestamp>
	<driver_version>{driver}</driver_version>
	<cuda_version>12.8</cuda_version>
	<attached_gpus>{count}</attached_gpus>
"""
_CARD = """	<gpu id="{address}">
		<product_name>{name}</product_name>
		<persistence_mode>Enabled</persistence_mode>
		<gpu_reset_status>
			<reset_required>{reset_required}</reset_required>
			<drain_and_reset_recommended>No</drain_and_reset_recommended>
		</gpu_reset_status>
		<clocks_event_reasons>
			<clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
			<clocks_event_reason_sw_power_cap>Not Active</clocks_event_reason_sw_power_cap>
			<clocks_event_reason_hw_slowdown>{hw_slowdown}</clocks_event_reason_hw_slowdown>
			<clocks_event_reason_hw_thermal_slowdown>{hw_thermal}</clocks_event_reason_hw_thermal_slowdown>
			<clocks_event_reason_hw_power_brake_slowdown>Not Active</clocks_event_reason_hw_power_brake_slowdown>
			<clocks_event_reason_sw_thermal_slowdown>Not Active</clocks_event_reason_sw_thermal_slowdown>
		</clocks_event_reasons>
		<fb_memory_usage>
			<total>{memory} MiB</total>
			<reserved>551 MiB</reserved>
			<used>{used} MiB</used>
		</fb_memory_usage>
		<ecc_errors>
			<volatile>
				<sram_correctable>0</sram_correctable>
				<sram_uncorrectable_parity>0</sram_uncorrectable_parity>
				<sram_uncorrectable_secded>0</sram_uncorrectable_secded>
				<dram_correctable>12</dram_correctable>
				<dram_uncorrectable>{uncorrectable}</dram_uncorrectable>
			</volatile>
			<aggregate>
				<dram_uncorrectable>3</dram_uncorrectable>
			</aggregate>
		</ecc_errors>
		<retired_pages>
			<pending_retirement>N/A</pending_retirement>
		</retired_pages>
		<remapped_rows>
			<remapped_row_unc>0</remapped_row_unc>
			<remapped_row_pending>{remapped}</remapped_row_pending>
			<remapped_row_failure>No</remapped_row_failure>
		</remapped_rows>
		<gpu_power_readings>
			<power_draw>71.33 W</power_draw>
			<current_power_limit>{watts} W</current_power_limit>
			<default_power_limit>700.00 W</default_power_limit>
		</gpu_power_readings>
		<processes>{processes}
		</processes>
	</gpu>
"""
_PROCESS = """
			<process_info>
				<pid>{pid}</pid>
				<type>C</type>
				<process_name>{name}</process_name>
				<used_memory>61440 MiB</used_memory>
			</process_info>"""
_USUAL = {
    "name": "NVIDIA H100 80GB HBM3", "reset_required": "No", "hw_slowdown": "Not Active", "hw_thermal": "Not Active",
    "memory": "81559", "used": "1", "uncorrectable": "0", "remapped": "No", "watts": "700.00", "processes": "",
}  # fmt: skip


def smi(count: int = 2, driver: str = "570.124.06", changed: Mapping[str, str] | None = None) -> str:
    """Return the output for `count` GPUs, with `changed` values of the last one."""
    cards = []
    for number in range(count):
        values = _USUAL | {"address": f"00000000:{0x1B + 16 * number:02X}:00.0"}
        cards.append(_CARD.format_map(values | dict(changed or {}) if number == count - 1 else values))
    return _HEAD.format(driver=driver, count=count) + "".join(cards) + "</nvidia_smi_log>\n"


def process(pid: int, name: str) -> str:
    """Return the entry of a process that computes on a GPU, for `changed`."""
    return _PROCESS.format(pid=pid, name=name)


# Lines of the kernel's log: of a GPU that is gone, and of a program's own mistake
XID_79 = "[  812.402116] NVRM: Xid (PCI:0000:2b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
XID_31 = (
    "[  640.118293] NVRM: Xid (PCI:0000:1b:00): 31, pid=4242, name=python, Ch 00000008, intr 00000000. MMU Fault: ENGINE "
    "GRAPHICS GPCCLIENT_T1_0 faulted @ 0x7f32_9c000000. Fault is of type FAULT_PDE ACCESS_TYPE_VIRT_READ"
)
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver "
    "is installed and running."
)
