// Package tun moves IP packets between this program and a TUN device: in batches, with the offload header of every
// packet decoded, checked and counted.
//
// It is for whoever puts a network stack behind a device: it knows files, virtio headers and the kernel's error
// numbers, and knows neither a network stack nor a filter. It does not parse IP, and it does not make namespaces.
//
// The first calls: [Open] makes a device or takes over one that exists, [Configure] gives it addresses and routes,
// [Device.Queues] hands out the queues to read and write.
//
//	kernel ──► queue of the device (txqueuelen) ──readv──► virtio header ─► checks ─► Packet    (Read, TryRead)
//	kernel ◄────────── receive path of the kernel ◄─writev── virtio header ◄─ checks ◄─ Packet    (Write)
//
// Three devices implement [Device]:
//
//   - the Linux fast path, with virtio headers, segmentation and checksum offload, and one or more queues;
//   - the portable path, whole packets through github.com/songgao/water, where offload is not to be had or not wanted;
//   - package tuntest, in memory.
//
// A program without rights over a device's namespace gets the descriptors from one that has them: [OpenForHandover]
// there, [Adopt] here.
//
// What a device delivers is not trusted: a packet whose header points outside the packet is refused, counted under
// exactly one [DropReason], and reading goes on. What a device answers is translated: every error of a queue is one of
// the sentinels below, whatever the kernel said, so that a device that is deleted, goes down or runs out of memory is
// a case to handle and never a surprise.
//
// Lock order: a Device's event lock is a leaf, and so is a Ring's lock; neither is held across a system call that can
// wait. A queue's read side and its write side share nothing but the descriptor, which is counted in use while a call
// runs, so that Close never frees a descriptor number under a reader.
package tun
