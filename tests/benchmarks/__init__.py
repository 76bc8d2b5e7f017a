# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The figures of docs/benchmarks.md: measured on the simulator through the real nbdkit plugin, beside their peers."""
